// CUDA built for a CPU, for tests: a CTA's threads are fibers of one thread, __syncthreads a barrier, a warp shuffle an
// exchange through memory between two barriers of the warp. A fiber runs from barrier to barrier, in rising order of threads
// in even CTAs and in falling order in odd ones: what lacks a barrier is wrong in one of them. CTAs run one after the other,
// so kernels that wait for other CTAs would hang (and abort here); those only ever let the last one finish the work.
#pragma once
#define EMULATE
#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <cstdio>
#include <cstdlib>
#include <functional>
#include <ucontext.h>
#include <vector>

typedef uint32_t u32;
typedef uint16_t u16;
typedef uint64_t u64;
struct Dim { int x = 1, y = 1, z = 1; };
struct uint4 { u32 x, y, z, w; };
struct float4 { float x, y, z, w; };
static inline uint4 make_uint4(u32 a, u32 b, u32 c, u32 d) { return {a, b, c, d}; }
static inline float4 make_float4(float a, float b, float c, float d) { return {a, b, c, d}; }

static Dim threadIdx, blockIdx;
static Dim gridDim;
static const unsigned char GUARD = 0xa5;  // behind the shared memory that was asked for
static int overruns = 0;
static ucontext_t scheduler;
struct Fiber {
    ucontext_t context;
    std::vector<char> stack = std::vector<char>(1 << 18);
    bool done = false;
};
static std::vector<Fiber> fibers;  // one per thread of a CTA, kept from CTA to CTA
static std::function<void()> body;
static bool moved;  // whether any fiber passed a barrier or ended in this round
static inline void yield() { swapcontext(&fibers[threadIdx.x].context, &scheduler); }
struct Barrier {
    int size, count = 0, round = 0;
    void wait() {
        int mine = round;
        if (++count == size) count = 0, round++;
        do yield();
        while (round == mine);
        moved = true;
    }
};
static void fiber() {
    body();
    fibers[threadIdx.x].done = moved = true;
    yield();
}
struct Cta {
    Barrier all;
    std::vector<Barrier> warps;
    std::vector<u32> exchange;
    std::vector<unsigned char> memory;
    Cta(int threads, int bytes) : all{threads}, warps(threads / 32, Barrier{32}), exchange(threads), memory(bytes + 128, GUARD) {}
};
static Cta* cta;

#define __device__ static
#define __forceinline__ inline
#define ENTRY static void
#define SHARED unsigned char* shared = (unsigned char*)(((uintptr_t)cta->memory.data() + 63) & ~(uintptr_t)63);
static inline void __syncthreads() { cta->all.wait(); }
static inline void __threadfence() {}
static inline void wait_for_previous() {}
static inline void let_next_start() {}
static inline void warp_wait() { cta->warps[threadIdx.x / 32].wait(); }
template <class T> static T __shfl_xor_sync(u32, T v, int mask) {
    std::memcpy(&cta->exchange[threadIdx.x], &v, 4);
    warp_wait();
    T r;
    std::memcpy(&r, &cta->exchange[(threadIdx.x & ~31) | ((threadIdx.x & 31) ^ mask)], 4);
    warp_wait();
    return r;
}
template <class T> static T __shfl_sync(u32, T v, int lane) {
    std::memcpy(&cta->exchange[threadIdx.x], &v, 4);
    warp_wait();
    T r;
    std::memcpy(&r, &cta->exchange[(threadIdx.x & ~31) | lane], 4);
    warp_wait();
    return r;
}
static u32 __ballot_sync(u32, bool v) {
    cta->exchange[threadIdx.x] = v;
    warp_wait();
    u32 r = 0;
    for (int i = 0; i < 32; i++) r |= cta->exchange[(threadIdx.x & ~31) | i] << i;
    warp_wait();
    return r;
}
static inline int __popc(u32 v) { return __builtin_popcount(v); }
static inline int atomicAdd(int* p, int v) { return std::atomic_ref<int>(*p).fetch_add(v); }
static inline u32 atomicAdd(u32* p, u32 v) { return std::atomic_ref<u32>(*p).fetch_add(v); }
static inline void atomicAdd(float* p, float v) { std::atomic_ref<float>(*p).fetch_add(v); }
static inline void add4(float* p, float4 v) { atomicAdd(p, v.x), atomicAdd(p + 1, v.y), atomicAdd(p + 2, v.z), atomicAdd(p + 3, v.w); }
static inline uint4 load_weight(const void* p, bool wanted) { return wanted ? *(const uint4*)p : uint4{0, 0, 0, 0}; }
static inline uint4 load_cached(const void* p, bool wanted) { return load_weight(p, wanted); }
static inline void copy_weight(uint4* to, const void* from, bool wanted) { *to = load_weight(from, wanted); }
static inline void prefetch(const void*) {}
static inline void close_group() {}
template <int PENDING> static inline void wait_group() {}
template <class T> static T __ldcg(const T* p) { return *p; }
static inline u64 wait_for(const u64* word) {
    if (!*word) std::fprintf(stderr, "a CTA waits for a word that none before it published\n"), std::abort();
    return *word;
}
static inline void publish(u64* word, u64 v) { *word = v; }
static std::vector<const void*> prefetched;  // rows asked for early
static inline void prefetch_row(const void* p, int) { prefetched.push_back(p); }
static inline u32 __float_as_uint(float f) { u32 v; std::memcpy(&v, &f, 4); return v; }
static inline float __uint_as_float(u32 v) { float f; std::memcpy(&f, &v, 4); return f; }
static inline float half_to_float(u16 h) { _Float16 f; std::memcpy(&f, &h, 2); return (float)f; }
static inline u16 float_to_half(float v) { _Float16 f = (_Float16)v; u16 h; std::memcpy(&h, &f, 2); return h; }
static inline u16 float_to_bf16(float v) { u32 b; std::memcpy(&b, &v, 4); b += 0x7fff + ((b >> 16) & 1); return (u16)(b >> 16); }
#define __expf(v) std::exp((float)(v))
static inline float rsqrtf(float v) { return 1.0f / std::sqrt(v); }
using std::max;
using std::min;

// Run `kernel(args...)` on a grid of CTAs with `threads` threads and `bytes` of shared memory each.
template <class F> static void launch(int gx, int gy, int threads, int bytes, F kernel) {
    gridDim = {gx, gy, 1};
    if ((int)fibers.size() < threads) fibers = std::vector<Fiber>(threads);
    body = kernel;
    int idle = 0;
    for (int by = 0; by < gy; by++)
        for (int bx = 0; bx < gx; bx++) {
            Cta group(threads, bytes);
            cta = &group;
            blockIdx = {bx, by, 0};
            for (auto& each : fibers) {
                getcontext(&each.context);
                each.context.uc_stack.ss_sp = each.stack.data(), each.context.uc_stack.ss_size = each.stack.size();
                each.done = false;
                makecontext(&each.context, fiber, 0);
            }
            for (int left = threads; left;) {
                moved = false;
                for (int i = 0; i < threads; i++) {
                    threadIdx = {(by * gx + bx) % 2 ? threads - 1 - i : i, 0, 0};
                    Fiber& each = fibers[threadIdx.x];
                    if (each.done) continue;
                    swapcontext(&scheduler, &each.context);
                    left -= each.done;
                }
                if (!moved && left && ++idle > 1) std::fprintf(stderr, "threads wait for a barrier that others never reach\n"), std::abort();
                idle = moved ? 0 : idle;
            }
            SHARED
            for (int i = bytes; i < bytes + 32; i++) overruns += shared[i] != GUARD;
        }
}
