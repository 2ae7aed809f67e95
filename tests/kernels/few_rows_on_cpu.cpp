// sparsebench/kernels/few_rows.cu as a shared library for the CPU: one function per kernel.
#include "cuda_on_cpu.h"
#include <utility>
#include CUDA_SOURCE

extern "C" {
int count_overruns() { return std::exchange(overruns, 0); }
void run_few_rows_2(int gx, int gy, int bytes, const FewRows* a) { launch(gx, gy, THREADS, bytes, [=] { few_rows_2(*a); }); }
void run_few_rows_4(int gx, int gy, int bytes, const FewRows* a) { launch(gx, gy, THREADS, bytes, [=] { few_rows_4(*a); }); }
void run_few_rows_8(int gx, int gy, int bytes, const FewRows* a) { launch(gx, gy, THREADS, bytes, [=] { few_rows_8(*a); }); }
void run_few_rows_16(int gx, int gy, int bytes, const FewRows* a) { launch(gx, gy, THREADS, bytes, [=] { few_rows_16(*a); }); }
}
