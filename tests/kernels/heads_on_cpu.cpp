// sparsebench/kernels/heads.cu as a shared library for the CPU.
#include "cuda_on_cpu.h"
#include <utility>
#include CUDA_SOURCE

extern "C" {
int count_overruns() { return std::exchange(overruns, 0); }
void run_attend_kept(int gx, int gy, int bytes, const Heads* a) { launch(gx, gy, THREADS, bytes, [=] { attend_kept(*a); }); }
}
