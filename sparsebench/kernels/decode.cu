// One decode step of a Llama-type model at batch 1, dense or sparse, as five kernels a layer (decode/fused_cuda.py launches them).
//
//   embed                         residual = embedding[token]
//   gather  NORM       q, k, v    norm, threshold and compaction in front of the product, no kernel of their own
//   attend                        rotary embedding, cache append, attention; one partial result per split of the context
//   gather  ATTENTION  o          merges the splits in front; adds into the residual
//   gather  NORM       gate, up
//   gather  SWIGLU     down       silu(gate) * up in front; adds into the residual
//   gather  PLAIN      after a map with a low-rank remainder: B of it, whose A is a further part of the map's own kernel
//   rows    head                  final norm, logits, argmax; the last CTA writes the next token and advances the position
//
// gather HALF is a product of its own (cuda_gather.py); rows with `gate` and gather NEURON are a neuron-sparse FFN;
// expert_keep, expert_hidden and expert_last are an expert FFN with its router.
//
// gather reads the weights of kept input channels only. W is stored [n, m]: one input channel is contiguous. A CTA takes
// TILE outputs and one of several equal shares of the channels, and compacts the kept channels of its share into shared
// memory, so no list of indices goes through memory. A warp reads TILE outputs of one channel with 16-byte loads, LOADS
// channels in flight; warps are summed in shared memory, CTAs by fp32 atomics. Sums that several CTAs add into start at
// zero: each is cleared by a kernel between its last reader and its next writer.
//
// With DENSE the same products drop nothing and list nothing: rows in order, the first of them on their way before the
// input is there (no choice depends on it). That is the dense baseline.
//
// Compile-time: BF16 (else fp16), DENSE, TOPK (select.cu), WARPS, LOADS, WIDE (16-byte loads per lane and channel), HEAD_DIM, GROUP (query heads
// per key-value head), SPLITS (of the context). EMULATE builds the same code for a CPU, for tests. Sizes must be
// multiples of 8.

#ifndef EMULATE
typedef unsigned int u32;
typedef unsigned short u16;
typedef unsigned long long u64;
#define SHARED extern __shared__ __align__(16) unsigned char shared[];
#define ENTRY extern "C" __global__ void __launch_bounds__(WARPS * 32)

// 16 bytes of a weight, or zeros. Streamed once, so kept out of L1; predicated instead of branched around, so that the
// compiler issues a whole batch of loads before it waits for the first.
__device__ __forceinline__ uint4 load_weight(const void* p, bool wanted) {
    uint4 r;
    asm volatile(
        "{ .reg .pred q; setp.ne.b32 q, %5, 0; mov.b32 %0, 0; mov.b32 %1, 0; mov.b32 %2, 0; mov.b32 %3, 0;"
        "  @q ld.global.nc.L1::no_allocate.v4.u32 {%0, %1, %2, %3}, [%4]; }"
        : "=&r"(r.x), "=&r"(r.y), "=&r"(r.z), "=&r"(r.w) : "l"(p), "r"((int)wanted));
    return r;
}
// 16 bytes of the cache, or zeros: as above, but the new position is written in this kernel, so not the read-only path.
__device__ __forceinline__ uint4 load_cached(const void* p, bool wanted) {
    uint4 r;
    asm volatile(
        "{ .reg .pred q; setp.ne.b32 q, %5, 0; mov.b32 %0, 0; mov.b32 %1, 0; mov.b32 %2, 0; mov.b32 %3, 0;"
        "  @q ld.global.v4.u32 {%0, %1, %2, %3}, [%4]; }"
        : "=&r"(r.x), "=&r"(r.y), "=&r"(r.z), "=&r"(r.w) : "l"(p), "r"((int)wanted));
    return r;
}
// As load_weight without a register: into shared memory, waited for by group. It keeps LOADS rows in flight whatever the
// compiler thinks of register pressure (it serialised plain loads).
__device__ __forceinline__ void copy_weight(uint4* to, const void* from, bool wanted) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"((u32)__cvta_generic_to_shared(to)), "l"(from), "r"(wanted ? 16 : 0) : "memory");
}
__device__ __forceinline__ void close_group() { asm volatile("cp.async.commit_group;" ::: "memory"); }
template <int PENDING> __device__ __forceinline__ void wait_group() { asm volatile("cp.async.wait_group %0;" ::"n"(PENDING) : "memory"); }
// Into the second-level cache only: harmless wherever what is stored there may still change.
__device__ __forceinline__ void prefetch(const void* p) { asm volatile("prefetch.global.L2 [%0];" ::"l"(p)); }
__device__ __forceinline__ void add4(float* p, float4 v) {
#if __CUDA_ARCH__ >= 900
    asm volatile("red.global.add.v4.f32 [%0], {%1,%2,%3,%4};" ::"l"(p), "f"(v.x), "f"(v.y), "f"(v.z), "f"(v.w) : "memory");
#else
    atomicAdd(p, v.x), atomicAdd(p + 1, v.y), atomicAdd(p + 2, v.z), atomicAdd(p + 3, v.w);
#endif
}
__device__ __forceinline__ void wait_for_previous() {
#if __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}
__device__ __forceinline__ void let_next_start() {
#if __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.launch_dependents;");
#endif
}
__device__ __forceinline__ float half_to_float(u16 h) {
    float f;
    asm("cvt.f32.f16 %0, %1;" : "=f"(f) : "h"(h));
    return f;
}
__device__ __forceinline__ u16 float_to_half(float f) {
    u16 h;
    asm("cvt.rn.f16.f32 %0, %1;" : "=h"(h) : "f"(f));
    return h;
}
__device__ __forceinline__ u16 float_to_bf16(float f) {
    u16 h;
    asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(h) : "f"(f));
    return h;
}
#endif

#define FULL 0xffffffffu
#define THREADS (WARPS * 32)
#define TILE (256 * WIDE)

#ifdef BF16
__device__ __forceinline__ float widen(u16 h) { return __uint_as_float((u32)h << 16); }
__device__ __forceinline__ u16 narrow(float f) { return float_to_bf16(f); }
#else
__device__ __forceinline__ float widen(u16 h) { return half_to_float(h); }
__device__ __forceinline__ u16 narrow(float f) { return float_to_half(f); }
#endif

__device__ __forceinline__ void widen8(uint4 w, float* out) {
    const u32 q[4] = {w.x, w.y, w.z, w.w};
#pragma unroll
    for (int i = 0; i < 4; i++) {
        out[2 * i] = widen((u16)(q[i] & 0xffff));
        out[2 * i + 1] = widen((u16)(q[i] >> 16));
    }
}
__device__ __forceinline__ void axpy8(float* sum, uint4 w, float x) {
    float v[8];
    widen8(w, v);
#pragma unroll
    for (int i = 0; i < 8; i++) sum[i] += x * v[i];
}
__device__ __forceinline__ float silu(float g) { return g / (1.0f + __expf(-g)); }

__device__ __forceinline__ float warp_sum(float v) {
#pragma unroll
    for (int d = 16; d; d >>= 1) v += __shfl_xor_sync(FULL, v, d);
    return v;
}

// Sum of `v` over the CTA, for every thread. `scratch` holds WARPS floats.
__device__ float block_sum(float v, float* scratch) {
    v = warp_sum(v);
    if ((threadIdx.x & 31) == 0) scratch[threadIdx.x >> 5] = v;
    __syncthreads();
    float total = 0;
    for (int w = 0; w < WARPS; w++) total += scratch[w];
    __syncthreads();
    return total;
}

// 1 / rms of x[n] (RMSNorm).
__device__ float inverse_rms(const float* x, int n, float eps, float* scratch) {
    float sum = 0;
    for (int i = threadIdx.x * 4; i < n; i += THREADS * 4) {
        float4 v = *(const float4*)(x + i);
        sum += v.x * v.x + v.y * v.y + v.z * v.z + v.w * v.w;
    }
    return rsqrtf(block_sum(sum, scratch) / n + eps);
}

enum { PLAIN = 0, NORM = 1, SWIGLU = 2, ATTENTION = 3, HALF = 4, NEURON = 5 };

#define PARTS 6

struct Gather {              // up to PARTS products of one input each; those without outputs come last
    const u16* weight[PARTS];    // [n, m]
    const float* input[PARTS];   // [n]: the vector, the residual (NORM), gate (SWIGLU), partial sums (ATTENTION), 16-bit (HALF, NEURON)
    float* out[PARTS];           // [m], added into
    const float* scale[PARTS];   // c [n] of |x| c > t, or null
    const float* threshold[PARTS];  // one number each; below 0 keeps everything
    int m[PARTS], n[PARTS];
    int complement[PARTS];   // 1: take the dropped channels (A of a low-rank remainder)
    const float* second;     // [n]: up (SWIGLU, NEURON); softmax maxima and weights of the splits (ATTENTION)
    const u16* norm;         // [n]: weight of the norm (NORM)
    float eps;
    float* zero;             // cleared here for a later kernel
    int zero_count;
    u16* result;             // or null: where the last CTA of a tile puts the finished outputs [m] (one part only);
    const u16* bias;         // it then clears `out` and `arrived` for the next call
    u32* arrived;            // [tiles]
    int top_k[PARTS];        // with `choice`: the k of a rule that this launch chooses by, -1 where it is chosen already
    u64* choice[PARTS];      // null: the threshold alone decides (select.cu); parts of one rule share a word
    u32* guess[PARTS];       // or null: the limit of the token before
};

// Attention's output i from the splits of the context; CACHED: not written by a kernel that still runs.
template <bool CACHED>
__device__ __forceinline__ float of_splits(const float* partial, const float* softmax, int i) {
    auto load = [](const float* p) { return CACHED ? *p : __ldcg(p); };
    const int head = i / HEAD_DIM;
    float top = -1e30f, weight = 0, mixed = 0, high[SPLITS], share[SPLITS], part[SPLITS];
#pragma unroll
    for (int s = 0; s < SPLITS; s++) {
        high[s] = load(softmax + (head * SPLITS + s) * 2), share[s] = load(softmax + (head * SPLITS + s) * 2 + 1);
        part[s] = load(partial + (head * SPLITS + s) * HEAD_DIM + i % HEAD_DIM);
    }
#pragma unroll
    for (int s = 0; s < SPLITS; s++) top = fmaxf(top, high[s]);
#pragma unroll
    for (int s = 0; s < SPLITS; s++) {
        const float fade = __expf(high[s] - top);
        weight += share[s] * fade, mixed += part[s] * fade;
    }
    return mixed / weight;
}

template <int MODE>
__device__ __forceinline__ float input_value(const Gather& a, const float* input, int i, float inverse) {
    if (MODE == NORM) return input[i] * inverse * widen(a.norm[i]);
    if (MODE == SWIGLU) return silu(input[i]) * a.second[i];
    if (MODE == HALF) return widen(((const u16*)input)[i]);
    if (MODE == NEURON) return widen(((const u16*)input)[i]) * a.second[i];
    if (MODE == PLAIN) return input[i];
    return of_splits<true>(input, a.second, i);
}

#include "select.cu"

// sum += value * row over this warp's `mine` rows, which lie in the ring as they arrive; `fetch` starts the row LOADS ahead.
template <class Fetch>
__device__ __forceinline__ void add_rows(float* sum, const uint4* ring, const float* value, int mine, Fetch fetch) {
    const int warp = threadIdx.x >> 5;
    for (int t = 0; t < mine; t++) {
        wait_group<LOADS - 1>();
        const float v = value[warp + t * WARPS];
#pragma unroll
        for (int d = 0; d < WIDE; d++) axpy8(sum + 8 * d, ring[((t % LOADS) * WIDE + d) * THREADS + threadIdx.x], v);
        fetch(t + LOADS);
    }
    wait_group<0>();
    __syncthreads();
}

// out[tile] += the warps' sums of 8 WIDE outputs a lane, brought together in shared memory [WARPS][TILE].
__device__ __forceinline__ void add_warps(const float* sum, float* sums, float* out, int tile, int m) {
    const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5;
#pragma unroll
    for (int d = 0; d < WIDE; d++) {
        float4* mine = (float4*)(sums + warp * TILE + d * 256 + lane * 8);
        mine[0] = make_float4(sum[8 * d], sum[8 * d + 1], sum[8 * d + 2], sum[8 * d + 3]);
        mine[1] = make_float4(sum[8 * d + 4], sum[8 * d + 5], sum[8 * d + 6], sum[8 * d + 7]);
    }
    __syncthreads();
    for (int i = threadIdx.x; i < TILE / 4; i += THREADS) {
        if (tile * TILE + i * 4 >= m) continue;
        float4 whole = ((float4*)sums)[i];
        for (int w = 1; w < WARPS; w++) {
            const float4 other = ((float4*)(sums + w * TILE))[i];
            whole.x += other.x, whole.y += other.y, whole.z += other.z, whole.w += other.w;
        }
        add4(out + tile * TILE + i * 4, whole);
    }
}

// The last CTA of a tile to arrive rounds the sums, adds the bias and leaves sums and counter at zero for the next call.
template <int WIDTH = TILE>
__device__ __forceinline__ void round_last(
    float* out, u16* result, const u16* bias, u32* arrived, int* last, int tile, int m) {
    __threadfence();
    __syncthreads();
    if (threadIdx.x == 0) *last = atomicAdd(arrived + tile, 1u) == gridDim.y - 1;
    __syncthreads();
    if (!*last) return;
    __threadfence();
    for (int i = tile * WIDTH + threadIdx.x; i < min(m, (tile + 1) * WIDTH); i += THREADS) {
        result[i] = narrow(__ldcg(out + i) + (bias ? widen(bias[i]) : 0.0f));
        out[i] = 0;
    }
    if (threadIdx.x == 0) arrived[tile] = 0;
}

// Grid: (tiles of all parts, shares of the channels).
template <int MODE>
__device__ void gather(const Gather& a) {
    constexpr int ITEMS = MODE == ATTENTION ? 1 : 8;  // channels a thread looks at together
    constexpr int CHUNK = ITEMS * THREADS;
    SHARED
    uint4* ring = (uint4*)shared;                   // [LOADS][WIDE][THREADS]: a thread reads what it copied itself
    float* sums = (float*)shared;                   // [WARPS][TILE], when the ring is done with
    float* value = (float*)(ring + LOADS * WIDE * THREADS);  // [CHUNK] (the host reserves 8 * THREADS)
    u16* index = (u16*)(value + CHUNK);             // [CHUNK], relative to the chunk
    int* count = (int*)(index + CHUNK);
    float* scratch = (float*)(count + 4);           // [WARPS]
    const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5;
    int tile = blockIdx.x, part = 0;
    while (tile >= (a.m[part] + TILE - 1) / TILE) tile -= (a.m[part++] + TILE - 1) / TILE;
    const int m = a.m[part], n = a.n[part], column = tile * TILE + lane * 8;
    const float* input = a.input[part];
    const int first = (int)((long)n * blockIdx.y / gridDim.y), last = (int)((long)n * (blockIdx.y + 1) / gridDim.y);
    float sum[8 * WIDE];
#pragma unroll
    for (int i = 0; i < 8 * WIDE; i++) sum[i] = 0;
    float inverse = 0;
    auto begin = [&]() {  // once what the kernels before have written may be read
        wait_for_previous();
        let_next_start();
        const int cta = blockIdx.y * gridDim.x + blockIdx.x;
        for (int i = cta * THREADS + threadIdx.x; i < a.zero_count; i += gridDim.x * gridDim.y * THREADS) a.zero[i] = 0;
        if (MODE == NORM) inverse = inverse_rms(input, n, a.eps, scratch);
    };
#ifdef DENSE
    bool begun = false;
#else
    const bool dropped = a.complement[part];
    const float* scale = a.scale[part];
    begin();
    const Limit limit = limit_of<MODE>(a, part, inverse, first, last, a.weight[part] + tile * TILE, m * 2L, min(TILE, m - tile * TILE) * 2);
#endif
    for (int chunk = first; chunk < last; chunk += CHUNK) {
        const int size = min(CHUNK, last - chunk);
        int channels = size;  // of this chunk
#ifndef DENSE
        if (threadIdx.x == 0) *count = 0;
        __syncthreads();
        float x[ITEMS];
        u32 kept[ITEMS];
        int total = 0;
#pragma unroll
        for (int t = 0; t < ITEMS; t++) {  // all loads first, then one place in the list per warp
            const int i = t * THREADS + threadIdx.x;
            x[t] = i < size ? input_value<MODE>(a, input, chunk + i, inverse) : 0.0f;
        }
#pragma unroll
        for (int t = 0; t < ITEMS; t++) {
            const int i = t * THREADS + threadIdx.x;
            const float magnitude = fabsf(x[t]) * (scale && i < size ? scale[chunk + i] : 1.0f);
            kept[t] = __ballot_sync(FULL, i < size && passes(limit, x[t], magnitude, chunk + i) != dropped);
            total += __popc(kept[t]);
        }
        int place = 0;
        if (lane == 0 && total) place = atomicAdd(count, total);
        place = __shfl_sync(FULL, place, 0);
#pragma unroll
        for (int t = 0; t < ITEMS; t++) {
            if (kept[t] >> lane & 1) {
                const int at = place + __popc(kept[t] & ((1u << lane) - 1));
                index[at] = (u16)(t * THREADS + threadIdx.x), value[at] = x[t];
            }
            place += __popc(kept[t]);
        }
        __syncthreads();
        channels = *count;
#endif
        const u16* rows = a.weight[part] + (long)chunk * m + column;
        const int mine = channels > warp ? (channels - warp + WARPS - 1) / WARPS : 0;  // of this warp: warp, warp + WARPS, ...
        auto fetch = [&](int t) {
            const bool wanted = t < mine;
#ifdef DENSE
            const u16* row = rows + (long)(wanted ? warp + t * WARPS : 0) * m;
#else
            const u16* row = rows + (long)(wanted ? index[warp + t * WARPS] : 0) * m;
#endif
#pragma unroll
            for (int d = 0; d < WIDE; d++)
                copy_weight(ring + ((t % LOADS) * WIDE + d) * THREADS + threadIdx.x, row + d * 256, wanted && column + d * 256 < m);
            close_group();
        };
#pragma unroll
        for (int t = 0; t < LOADS; t++) fetch(t);
#ifdef DENSE
        if (!begun) begin(), begun = true;
        for (int i = threadIdx.x; i < size; i += THREADS) value[i] = input_value<MODE>(a, input, chunk + i, inverse);
        __syncthreads();
#endif
        add_rows(sum, ring, value, mine, fetch);
    }
#ifdef DENSE
    if (!begun) begin();
#endif
    add_warps(sum, sums, a.out[part], tile, m);
    if (a.result) round_last(a.out[0], a.result, a.bias, a.arrived, count, tile, m);
}

ENTRY gather_plain(Gather a) { gather<PLAIN>(a); }
ENTRY gather_norm(Gather a) { gather<NORM>(a); }
ENTRY gather_swiglu(Gather a) { gather<SWIGLU>(a); }
ENTRY gather_attention(Gather a) { gather<ATTENTION>(a); }
ENTRY gather_half(Gather a) { gather<HALF>(a); }
ENTRY gather_neuron(Gather a) { gather<NEURON>(a); }
#ifdef BITS  // of quantised weights, 8 or 4
#include "quant.cu"
#endif

ENTRY embed(const u16* table, const int* token, float* residual, int n) {
    wait_for_previous();
    let_next_start();
    const u16* row = table + (long)*token * n;
    for (int i = blockIdx.x * THREADS + threadIdx.x; i < n; i += gridDim.x * THREADS) residual[i] = widen(row[i]);
}

// ------------------------------------------------------------------------------------------------------------------
// Attention of one new token over the context. CTA (kv head, split). A position is read by HEAD_DIM / 8 lanes (a team),
// 16 bytes each; a team keeps its own running softmax, teams are merged by shuffles and in shared memory, and the
// splits in front of the output projection (gather, ATTENTION).

#define TEAM (HEAD_DIM / 8)
#define TEAMS (THREADS / TEAM)

struct Attend {
    const float *q, *k, *v;           // sums of the projections: [heads * HEAD_DIM], [kv heads * HEAD_DIM] twice
    const u16 *q_bias, *k_bias, *v_bias;  // or null
    const float *cosine, *sine;       // [positions, HEAD_DIM], as transformers' rotary embedding gives them
    u16 *keys, *values;               // cache [kv heads, positions, HEAD_DIM]
    const int* position;              // of the new token
    float* partial;                   // [heads, SPLITS, HEAD_DIM]
    float* softmax;                   // [heads, SPLITS, 2]: maximum, sum of weights
    int positions, window;            // window > 0: only the last `window` positions are seen
    float scaling;
    float* whole;                     // or null: [heads * HEAD_DIM], where the last split of a head to arrive merges all
    u32* arrived;                     // [kv heads], zero between calls
};

__device__ __forceinline__ float biased(const float* x, const u16* bias, int i) { return x[i] + (bias ? widen(bias[i]) : 0.0f); }

// Rotary embedding of element d of one head (rotate_half convention).
__device__ __forceinline__ float rotated(const float* x, const u16* bias, int head, int d, const float* c, const float* s) {
    const int other = d < HEAD_DIM / 2 ? d + HEAD_DIM / 2 : d - HEAD_DIM / 2;
    const float turned = biased(x, bias, head * HEAD_DIM + other) * (d < HEAD_DIM / 2 ? -1.0f : 1.0f);
    return biased(x, bias, head * HEAD_DIM + d) * c[d] + turned * s[d];
}

ENTRY attend(Attend a) {
    SHARED
    float* query = (float*)shared;                       // [GROUP][HEAD_DIM], scaled
    float* merged = query + GROUP * HEAD_DIM;            // [WARPS][GROUP][HEAD_DIM + 2]
    const int head = blockIdx.x, split = blockIdx.y;
    const int team = threadIdx.x / TEAM, lane = threadIdx.x % TEAM, d = lane * 8, warp = threadIdx.x >> 5;
    wait_for_previous();
    let_next_start();
    const int now = *a.position;
    const float *c = a.cosine + (long)now * HEAD_DIM, *s = a.sine + (long)now * HEAD_DIM;
    u16* keys = a.keys + (long)head * a.positions * HEAD_DIM;
    u16* values = a.values + (long)head * a.positions * HEAD_DIM;
    const int begin = a.window > 0 ? max(0, now + 1 - a.window) : 0;
    const int length = now + 1 - begin;
    const int first = begin + (int)((long)length * split / SPLITS), last = begin + (int)((long)length * (split + 1) / SPLITS);
    // LOADS positions of a team are on their way while the ones before are summed; as many rounds for all lanes, since
    // shuffles need whole warps.
    const int rounds = (last - first + TEAMS * LOADS - 1) / (TEAMS * LOADS);
    uint4 next_key[LOADS], next_value[LOADS];
    auto fetch = [&](int round) {
#pragma unroll
        for (int l = 0; l < LOADS; l++) {
            const int p = first + (round * LOADS + l) * TEAMS + team;
            const bool wanted = p < min(last, now);
            next_key[l] = load_cached(keys + (long)p * HEAD_DIM + d, wanted);
            next_value[l] = load_cached(values + (long)p * HEAD_DIM + d, wanted);
        }
    };
    fetch(0);
    for (int i = threadIdx.x; i < GROUP * HEAD_DIM; i += THREADS)
        query[i] = rotated(a.q, a.q_bias, head * GROUP + i / HEAD_DIM, i % HEAD_DIM, c, s) * a.scaling;
    __syncthreads();
    float top[GROUP], weight[GROUP], sum[GROUP][8];
#pragma unroll
    for (int g = 0; g < GROUP; g++) {
        top[g] = -1e30f, weight[g] = 0;
#pragma unroll
        for (int i = 0; i < 8; i++) sum[g][i] = 0;
    }
    for (int round = 0; round < rounds; round++) {
        uint4 keys_now[LOADS], values_now[LOADS];
#pragma unroll
        for (int l = 0; l < LOADS; l++) keys_now[l] = next_key[l], values_now[l] = next_value[l];
        fetch(round + 1);
#pragma unroll
        for (int l = 0; l < LOADS; l++) {
            const int p = first + (round * LOADS + l) * TEAMS + team;
            float key[8], value[8];
            widen8(keys_now[l], key), widen8(values_now[l], value);
            if (p == now && p < last) {
#pragma unroll
                for (int i = 0; i < 8; i++) {
                    const u16 new_key = narrow(rotated(a.k, a.k_bias, head, d + i, c, s));
                    const u16 new_value = narrow(biased(a.v, a.v_bias, head * HEAD_DIM + d + i));
                    keys[(long)now * HEAD_DIM + d + i] = new_key, values[(long)now * HEAD_DIM + d + i] = new_value;
                    key[i] = widen(new_key), value[i] = widen(new_value);
                }
            }
#pragma unroll
            for (int g = 0; g < GROUP; g++) {
                float score = 0;
#pragma unroll
                for (int i = 0; i < 8; i++) score += key[i] * query[g * HEAD_DIM + d + i];
#pragma unroll
                for (int step = TEAM / 2; step; step >>= 1) score += __shfl_xor_sync(FULL, score, step);
                if (p >= last) continue;
                const float higher = fmaxf(top[g], score), fade = __expf(top[g] - higher), share = __expf(score - higher);
                weight[g] = weight[g] * fade + share, top[g] = higher;
#pragma unroll
                for (int i = 0; i < 8; i++) sum[g][i] = sum[g][i] * fade + share * value[i];
            }
        }
    }
#pragma unroll
    for (int g = 0; g < GROUP; g++) {
#pragma unroll
        for (int step = TEAM; step < 32; step <<= 1) {  // teams of a warp
            const float other = __shfl_xor_sync(FULL, top[g], step), higher = fmaxf(top[g], other);
            const float fade = __expf(top[g] - higher), share = __expf(other - higher);
            weight[g] = weight[g] * fade + __shfl_xor_sync(FULL, weight[g], step) * share, top[g] = higher;
#pragma unroll
            for (int i = 0; i < 8; i++) sum[g][i] = sum[g][i] * fade + __shfl_xor_sync(FULL, sum[g][i], step) * share;
        }
        float* mine = merged + (warp * GROUP + g) * (HEAD_DIM + 2);
        if ((threadIdx.x & 31) < TEAM)
#pragma unroll
            for (int i = 0; i < 8; i++) mine[d + i] = sum[g][i];
        if ((threadIdx.x & 31) == 0) mine[HEAD_DIM] = top[g], mine[HEAD_DIM + 1] = weight[g];
    }
    __syncthreads();
    for (int i = threadIdx.x; i < GROUP * HEAD_DIM; i += THREADS) {  // warps of the CTA
        const int g = i / HEAD_DIM;
        float higher = -1e30f, total = 0, mixed = 0;
#pragma unroll
        for (int w = 0; w < WARPS; w++) higher = fmaxf(higher, merged[(w * GROUP + g) * (HEAD_DIM + 2) + HEAD_DIM]);
#pragma unroll
        for (int w = 0; w < WARPS; w++) {
            const float* other = merged + (w * GROUP + g) * (HEAD_DIM + 2);
            const float share = __expf(other[HEAD_DIM] - higher);
            total += other[HEAD_DIM + 1] * share, mixed += other[i % HEAD_DIM] * share;
        }
        const int slot = (head * GROUP + g) * SPLITS + split;
        a.partial[slot * HEAD_DIM + i % HEAD_DIM] = mixed;
        if (i % HEAD_DIM == 0) a.softmax[slot * 2] = higher, a.softmax[slot * 2 + 1] = total;
    }
    if (!a.whole) return;
    __threadfence();
    __syncthreads();
    if (threadIdx.x == 0) *(u32*)shared = atomicAdd(a.arrived + head, 1u);
    __syncthreads();
    if (*(u32*)shared != SPLITS - 1) return;
    __threadfence();
    for (int i = head * GROUP * HEAD_DIM + threadIdx.x; i < (head + 1) * GROUP * HEAD_DIM; i += THREADS)
        a.whole[i] = of_splits<false>(a.partial, a.softmax, i);
    if (threadIdx.x == 0) a.arrived[head] = 0;
}

// ------------------------------------------------------------------------------------------------------------------
// rows: out[j] = W[j, :] . norm(input) for rows j of W [m, n] (row contiguous); with `gate`, only where
// gate[j] is not 0, with `active` only where |silu(active[j])| >= least (the others give 0).
// One warp per row. With `token`, also the argmax of all rows: the next token, and the position advances.

struct Rows {
    const u16* weight;      // [m, n]
    const float* input;     // residual [n]
    const u16* half;        // [n] 16-bit input in its place, or null
    const u16* norm;        // or null: the input as it is
    const u16* gate;        // [m] or null
    float* out;             // [m]
    float eps;
    int m, n;
    int *token, *position;  // or null
    float* best;            // [CTAs]
    int* best_row;          // [CTAs]
    u32* arrived;
    float* zero;
    int zero_count;
    const float *active, *least;  // [m] and one number, or null
};

// 16-byte loads of one piece (256 * LOADS columns) of row j; zeros outside, and for rows that `gate` leaves out.
__device__ __forceinline__ void load_piece(const Rows& a, int j, int piece, int lane, uint4* w) {
    const bool wanted = j < a.m && (!a.gate || widen(a.gate[j]) != 0) && (!a.active || fabsf(silu(a.active[j])) >= *a.least);
#pragma unroll
    for (int l = 0; l < LOADS; l++) {
        const int i = (piece * LOADS + l) * 256 + lane * 8;
        w[l] = load_weight(a.weight + (long)j * a.n + i, wanted && i < a.n);
    }
}

ENTRY rows(Rows a) {
    SHARED
    float* x = (float*)shared;           // [n]
    float* scratch = x + a.n;            // [WARPS]
    float* best = scratch + WARPS;       // [WARPS]
    int* best_row = (int*)(best + WARPS);
    int* is_last = best_row + WARPS;
    const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5;
    wait_for_previous();
    let_next_start();
    for (int i = blockIdx.x * THREADS + threadIdx.x; i < a.zero_count; i += gridDim.x * THREADS) a.zero[i] = 0;
    const float inverse = a.norm ? inverse_rms(a.input, a.n, a.eps, scratch) : 1.0f;
    for (int i = threadIdx.x; i < a.n; i += THREADS) x[i] = a.half ? widen(a.half[i]) : a.input[i] * inverse * (a.norm ? widen(a.norm[i]) : 1.0f);
    __syncthreads();
    float highest = -1e30f, sum = 0;
    int highest_row = 0;
    const int pieces = (a.n + 256 * LOADS - 1) / (256 * LOADS), stride = gridDim.x * WARPS;
    int j = blockIdx.x * WARPS + warp, piece = 0;
    uint4 w[LOADS], ahead[LOADS];
    load_piece(a, j, piece, lane, ahead);
    while (j < a.m) {
#pragma unroll
        for (int l = 0; l < LOADS; l++) w[l] = ahead[l];
        const int start = piece * 256 * LOADS + lane * 8, row = j;
        const bool finished = ++piece == pieces;
        if (finished) piece = 0, j += stride;
        load_piece(a, j, piece, lane, ahead);  // the next piece is on its way while this one is summed
#pragma unroll
        for (int l = 0; l < LOADS; l++) {
            const int i = start + l * 256;
            if (i >= a.n) continue;
            float v[8];
            widen8(w[l], v);
            const float4 low = *(const float4*)(x + i), high = *(const float4*)(x + i + 4);
            sum += v[0] * low.x + v[1] * low.y + v[2] * low.z + v[3] * low.w;
            sum += v[4] * high.x + v[5] * high.y + v[6] * high.z + v[7] * high.w;
        }
        if (!finished) continue;
        sum = warp_sum(sum);
        if (lane == 0) a.out[row] = sum;
        if (sum > highest) highest = sum, highest_row = row;
        sum = 0;
    }
    if (!a.token) return;
    if (lane == 0) best[warp] = highest, best_row[warp] = highest_row;
    __syncthreads();
    if (threadIdx.x == 0) {
        for (int w = 1; w < WARPS; w++)
            if (best[w] > best[0] || (best[w] == best[0] && best_row[w] < best_row[0])) best[0] = best[w], best_row[0] = best_row[w];
        a.best[blockIdx.x] = best[0], a.best_row[blockIdx.x] = best_row[0];
        __threadfence();
        *is_last = atomicAdd(a.arrived, 1u) == gridDim.x - 1;
    }
    __syncthreads();
    if (!*is_last || threadIdx.x != 0) return;
    __threadfence();
    float value = -1e30f;
    int row = 0;
    for (int b = 0; b < (int)gridDim.x; b++) {
        const float v = __ldcg(a.best + b);
        const int r = __ldcg(a.best_row + b);
        if (v > value || (v == value && r < row)) value = v, row = r;
    }
    *a.token = row;
    *a.position += 1;
    *a.arrived = 0;
}

#include "experts.cu"
