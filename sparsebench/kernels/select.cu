// Which channels a product of `gather` keeps: those above a threshold, or with TOPK the k largest |x| c of the token, exactly.
//
// Scores are not negative, so they are ordered as their bits are. The k largest are those whose bits lie above a limit, and
// of those equal to it the first by index: two numbers say all. One of the first CTAs of a launch finds them for each rule
// (`choose`) and publishes them in one word; the others wait for it. They can: CTAs start in the order of their numbers,
// which CUB's scans rely on, too. Meanwhile they fetch into L2 the first rows of their share that were above the limit of
// the token before: a guess that only decides what is on its way early. A later kernel clears the word.
//
// The limit is found by counting, in bins of equal width in the bits (128 to an octave), downwards from the largest; then
// again inside the bin that holds it, until all that is left in a bin is kept, mostly in the second round. No bin is hit
// by many threads at once, as those of whole exponents would be. Part of decode.cu.

#ifndef TOPK

typedef float Limit;

template <int MODE>
__device__ __forceinline__ Limit limit_of(const Gather& a, int part, float, int, int, const void*, long, int) {
    return *a.threshold[part];
}
__device__ __forceinline__ bool passes(Limit threshold, float, float score, int) { return score > threshold; }

#else

#ifndef EMULATE
__device__ __forceinline__ u64 wait_for(const u64* word) {
    u64 v;
    do asm volatile("ld.relaxed.gpu.global.u64 %0, [%1];" : "=l"(v) : "l"(word) : "memory");
    while (!v);
    return v;
}
__device__ __forceinline__ void publish(u64* word, u64 v) { asm volatile("st.relaxed.gpu.global.u64 [%0], %1;" ::"l"(word), "l"(v) : "memory"); }
// bytes: a multiple of 16
__device__ __forceinline__ void prefetch_row(const void* p, int bytes) {
#if __CUDA_ARCH__ >= 900
    asm volatile("cp.async.bulk.prefetch.L2.global [%0], %1;" ::"l"(p), "r"(bytes) : "memory");
#endif
}
#endif

#define BINS 1024
#ifndef AHEAD
#define AHEAD 128  // channels of a CTA's share that may be fetched early; 0 = none
#endif

struct Limit { u32 bits; int last; };  // kept: bits above, and equal ones up to index `last`; never a zero

__device__ __forceinline__ bool passes(Limit limit, float x, float score, int i) {
    const u32 bits = __float_as_uint(score);
    return (bits > limit.bits || (bits == limit.bits && i <= limit.last)) && x != 0;
}

struct Range { u32 low, high; int wanted, inside; };  // of keys: `inside` of them lie in it, the `wanted` largest are kept

// Narrows a range until all that is left in it is kept, or all of it is equal. scratch: [WARPS + 3].
__device__ void narrow(const u32* keys, int n, Range& r, u32* bins, u32* scratch) {
    constexpr int MINE = BINS / THREADS;
    const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5;
    while (r.wanted < r.inside && r.low < r.high) {
        int shift = 0;  // bins of 2^shift; what lies below them is the last bin
        while (shift < 16 && (r.high - r.low) >> shift >= BINS) shift++;
        for (int b = threadIdx.x; b < BINS; b += THREADS) bins[b] = 0;
        __syncthreads();
        for (int i = threadIdx.x; i < n; i += THREADS) {
            const u32 bin = (r.high - keys[i]) >> shift;
            if (keys[i] >= r.low && keys[i] <= r.high && bin < BINS - 1) atomicAdd(bins + bin, 1u);
        }
        __syncthreads();
        u32 mine = 0;
#pragma unroll
        for (int b = 0; b < MINE; b++) mine += bins[threadIdx.x * MINE + b];
        u32 upto = mine;
#pragma unroll
        for (int d = 1; d < 32; d <<= 1) {
            const u32 other = __shfl_sync(FULL, upto, (lane - d) & 31);
            if (lane >= d) upto += other;
        }
        if (lane == 31) scratch[warp] = upto;
        __syncthreads();
        u32 before = upto - mine, total = 0;
#pragma unroll
        for (int w = 0; w < WARPS; w++) {
            total += scratch[w];
            if (w < warp) before += scratch[w];
        }
        const u32 wanted = (u32)r.wanted;
        if (before < wanted && wanted <= before + mine) {
            int b = threadIdx.x * MINE;
            while (before + bins[b] < wanted) before += bins[b++];
            scratch[WARPS] = b, scratch[WARPS + 1] = before, scratch[WARPS + 2] = bins[b];
        } else if (threadIdx.x == 0 && total < wanted) {
            scratch[WARPS] = BINS - 1, scratch[WARPS + 1] = total, scratch[WARPS + 2] = r.inside - total;
        }
        __syncthreads();
        const u32 bin = scratch[WARPS], high = r.high - (bin << shift), width = 1u << shift;
        r.wanted -= scratch[WARPS + 1], r.inside = scratch[WARPS + 2];
        if (bin < BINS - 1 && high - r.low >= width) r.low = high - width + 1;
        r.high = high;
    }
    __syncthreads();
}

// The limit of the k largest of one part, published for all parts of the same rule.
template <int MODE>
__device__ void choose(const Gather& a, int part, float inverse) {
    constexpr int BATCH = MODE == ATTENTION ? 4 : 16;
    SHARED
    u32* bins = (u32*)shared;             // [BINS]
    u32* scratch = bins + BINS;           // [WARPS + 3]
    u32* keys = scratch + WARPS + 3;      // [n]
    const int n = a.n[part], k = min(a.top_k[part], n);
    const float* scale = a.scale[part];
    u32 highest = 0;
    __syncthreads();
    for (int start = threadIdx.x; start < n; start += BATCH * THREADS) {
        float x[BATCH], c[BATCH];
#pragma unroll
        for (int t = 0; t < BATCH; t++) {  // all loads first
            const int i = min(start + t * THREADS, n - 1);
            x[t] = input_value<MODE>(a, a.input[part], i, inverse), c[t] = scale ? scale[i] : 1.0f;
        }
#pragma unroll
        for (int t = 0; t < BATCH; t++) {
            const int i = start + t * THREADS;
            if (i >= n) break;
            keys[i] = __float_as_uint(fabsf(x[t]) * c[t]);
            highest = max(highest, keys[i]);
        }
    }
#pragma unroll
    for (int d = 16; d; d >>= 1) highest = max(highest, (u32)__shfl_xor_sync(FULL, highest, d));
    if ((threadIdx.x & 31) == 0) scratch[threadIdx.x >> 5] = highest;
    __syncthreads();
    for (int w = 0; w < WARPS; w++) highest = max(highest, scratch[w]);
    __syncthreads();
    Limit limit = {0x7fffffffu, 0};  // none
    if (k > 0) {
        Range r = {0, highest, k, n};
        narrow(keys, n, r, bins, scratch);
        limit.bits = r.low, limit.last = n;
        if (r.wanted < r.inside) {  // of equal ones the first: the largest n - i
            for (int i = threadIdx.x; i < n; i += THREADS) keys[i] = keys[i] == r.low ? n - i : 0;
            __syncthreads();
            Range first = {1, (u32)n, r.wanted, r.inside};
            narrow(keys, n, first, bins, scratch);
            limit.last = n - first.low;
        }
    }
    if (threadIdx.x) return;
    publish(a.choice[part], (u64)(limit.bits | 0x80000000u) << 32 | (u32)limit.last);
    if (a.guess[part]) *a.guess[part] = limit.bits;
}

// What a part keeps, known to the whole CTA. The CTA's share of the channels is [first, last); its rows begin at
// tile + i * stride and have `bytes`.
template <int MODE>
__device__ Limit limit_of(const Gather& a, int part, float inverse, int first, int last, const void* tile, long stride, int bytes) {
    SHARED
    const int cta = blockIdx.y * gridDim.x + blockIdx.x, ctas = gridDim.x * gridDim.y;
    for (int p = cta; p < PARTS; p += ctas)
        if (a.choice[p] && a.top_k[p] >= 0) choose<MODE>(a, p, inverse);
    const float threshold = *a.threshold[part];
    if (threshold < 0) return {0, a.n[part]};
    if (!a.choice[part]) return {__float_as_uint(threshold), -1};
    const int i = first + threadIdx.x;
    if (a.guess[part] && threadIdx.x < AHEAD && i < last && !a.complement[part]) {
        const float score = fabsf(input_value<MODE>(a, a.input[part], i, inverse)) * (a.scale[part] ? a.scale[part][i] : 1.0f);
        if (__float_as_uint(score) > *a.guess[part]) prefetch_row((const char*)tile + i * stride, bytes);
    }
    u64* heard = (u64*)shared;
    __syncthreads();
    if (threadIdx.x == 0) *heard = wait_for(a.choice[part]);
    __syncthreads();
    const u64 word = *heard;
    __syncthreads();
    return {(u32)(word >> 32) & 0x7fffffffu, (int)(u32)word};
}

// The choice alone, in front of a product that then only reads it. Grid: parts.
template <int MODE>
__device__ void choose_only(const Gather& a) {
    SHARED
    wait_for_previous();
    let_next_start();
    const int part = blockIdx.x;
    const float inverse = MODE == NORM ? inverse_rms(a.input[part], a.n[part], a.eps, (float*)shared) : 0.0f;
    if (a.choice[part] && a.top_k[part] >= 0) choose<MODE>(a, part, inverse);
}

ENTRY choose_plain(Gather a) { choose_only<PLAIN>(a); }
ENTRY choose_norm(Gather a) { choose_only<NORM>(a); }
ENTRY choose_swiglu(Gather a) { choose_only<SWIGLU>(a); }
ENTRY choose_half(Gather a) { choose_only<HALF>(a); }

#endif
