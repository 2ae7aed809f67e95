// The kernels of sparsebench/kernels/decode.cu as a shared library for the CPU: one function per kernel.
#include "cuda_on_cpu.h"
#include <utility>
#include DECODE_CU

extern "C" {
int count_overruns() { return std::exchange(overruns, 0); }
void run_gather_plain(int gx, int gy, int bytes, const Gather* a) { launch(gx, gy, THREADS, bytes, [=] { gather_plain(*a); }); }
void run_gather_norm(int gx, int gy, int bytes, const Gather* a) { launch(gx, gy, THREADS, bytes, [=] { gather_norm(*a); }); }
void run_gather_swiglu(int gx, int gy, int bytes, const Gather* a) { launch(gx, gy, THREADS, bytes, [=] { gather_swiglu(*a); }); }
void run_gather_attention(int gx, int gy, int bytes, const Gather* a) { launch(gx, gy, THREADS, bytes, [=] { gather_attention(*a); }); }
void run_gather_half(int gx, int gy, int bytes, const Gather* a) { launch(gx, gy, THREADS, bytes, [=] { gather_half(*a); }); }
void run_gather_neuron(int gx, int gy, int bytes, const Gather* a) { launch(gx, gy, THREADS, bytes, [=] { gather_neuron(*a); }); }
#ifdef TOPK
void run_choose_plain(int gx, int gy, int bytes, const Gather* a) { launch(gx, gy, THREADS, bytes, [=] { choose_plain(*a); }); }
void run_choose_norm(int gx, int gy, int bytes, const Gather* a) { launch(gx, gy, THREADS, bytes, [=] { choose_norm(*a); }); }
void run_choose_swiglu(int gx, int gy, int bytes, const Gather* a) { launch(gx, gy, THREADS, bytes, [=] { choose_swiglu(*a); }); }
void run_choose_half(int gx, int gy, int bytes, const Gather* a) { launch(gx, gy, THREADS, bytes, [=] { choose_half(*a); }); }
#endif
int count_prefetched() { return (int)std::exchange(prefetched, {}).size(); }
#ifdef BITS
void run_gather_packed_plain(int gx, int gy, int bytes, const PackedGather* a) { launch(gx, gy, THREADS, bytes, [=] { gather_packed_plain(*a); }); }
void run_gather_packed_norm(int gx, int gy, int bytes, const PackedGather* a) { launch(gx, gy, THREADS, bytes, [=] { gather_packed_norm(*a); }); }
void run_gather_packed_swiglu(int gx, int gy, int bytes, const PackedGather* a) { launch(gx, gy, THREADS, bytes, [=] { gather_packed_swiglu(*a); }); }
void run_gather_packed_attention(int gx, int gy, int bytes, const PackedGather* a) { launch(gx, gy, THREADS, bytes, [=] { gather_packed_attention(*a); }); }
void run_gather_packed_half(int gx, int gy, int bytes, const PackedGather* a) { launch(gx, gy, THREADS, bytes, [=] { gather_packed_half(*a); }); }
#endif
void run_attend(int gx, int gy, int bytes, const Attend* a) { launch(gx, gy, THREADS, bytes, [=] { attend(*a); }); }
void run_rows(int gx, int gy, int bytes, const Rows* a) { launch(gx, gy, THREADS, bytes, [=] { rows(*a); }); }
void run_expert_keep(int gx, int gy, int bytes, const Keep* a) { launch(gx, gy, THREADS, bytes, [=] { expert_keep(*a); }); }
void run_expert_hidden(int gx, int gy, int bytes, const Experts* a) { launch(gx, gy, THREADS, bytes, [=] { expert_hidden(*a); }); }
void run_expert_hidden_gated(int gx, int gy, int bytes, const Experts* a) { launch(gx, gy, THREADS, bytes, [=] { expert_hidden_gated(*a); }); }
void run_expert_last(int gx, int gy, int bytes, const Experts* a) { launch(gx, gy, THREADS, bytes, [=] { expert_last(*a); }); }
void run_embed(int gx, int gy, int bytes, const u16* table, const int* token, float* residual, int n) {
    launch(gx, gy, THREADS, bytes, [=] { embed(table, token, residual, n); });
}
}
