// Expert FFN of one token (modules/expert_ffn.py): y = b + sum of kept experts of act(A_e x + a_e) [(U_e x + u_e)] B_e.
//
//   expert_keep     scores of a linear router and its rule; one CTA an expert
//   expert_hidden   x1 of the neurons of kept experts, packed in the order of the experts
//   expert_last     the sum of their rows of the last map; the last CTA of each tile adds the bias and rounds
//
// Part of decode.cu. keep is a byte per expert, compacted by every CTA for itself, always in order, so that all agree what neuron u of the
// list is. The listed neurons are cut into equal ranges, so all SMs stay busy whatever the share. A kernel lets the next
// one start only after its own wait: what the kernel before it wrote is then finished for the next one, too.

struct Keep {
    const void* weight;      // router [experts, d], fp32 (wide) or 16 bits
    const u16* x;            // [d]
    const float* threshold;  // tau: sigmoid(score) > tau, all below 0
    unsigned char* keep;     // [experts]
    int wide, d;
};

// Grid: experts.
ENTRY expert_keep(Keep a) {
    SHARED
    float* scratch = (float*)shared;  // [WARPS]
    const char* row = (const char*)a.weight + (long)blockIdx.x * a.d * (a.wide ? 4 : 2);
    for (int i = threadIdx.x * 8; i < a.d; i += THREADS * 8) prefetch(row + i * (a.wide ? 4 : 2));
    wait_for_previous();
    let_next_start();
    float sum = 0;
    for (int i = threadIdx.x * 8; i < a.d; i += THREADS * 8) {
        float x[8], w[8];
        if (a.wide) {
            const float4 low = ((const float4*)row)[i / 4], high = ((const float4*)row)[i / 4 + 1];
            w[0] = low.x, w[1] = low.y, w[2] = low.z, w[3] = low.w, w[4] = high.x, w[5] = high.y, w[6] = high.z, w[7] = high.w;
        } else {
            widen8(load_weight(row + i * 2, true), w);
        }
        widen8(*(const uint4*)(a.x + i), x);
#pragma unroll
        for (int k = 0; k < 8; k++) sum += w[k] * x[k];
    }
    sum = block_sum(sum, scratch);
    if (threadIdx.x) return;
    const float tau = *a.threshold;
    a.keep[blockIdx.x] = tau < 0 || sum > logf(tau / (1.0f - tau));
}

enum { RELU = 0, SILU = 1, GELU = 2, GELU_TANH = 3 };

__device__ __forceinline__ float activate(float z, int name) {
    if (name == RELU) return fmaxf(z, 0.0f);
    if (name == SILU) return silu(z);
    if (name == GELU) return 0.5f * z * (1.0f + erff(z * 0.70710678118654752f));
    const float u = 0.79788456080286536f * (z + 0.044715f * z * z * z);
    return z / (1.0f + __expf(-2.0f * u));  // tanh(u) = 2 sigmoid(2u) - 1
}

struct Experts {
    const u16 *first, *first_bias, *up, *up_bias;  // [f, d], [f]; null where there is none
    const u16 *last, *last_bias;                   // [f, n], [n]
    const u16* x;                                  // [d]
    const unsigned char* keep;                     // [experts]
    float* hidden;                                 // [f]: x1 of the listed neurons
    float* sums;                                   // [n], zero between calls
    u16* result;                                   // [n]
    u32* arrived;                                  // [tiles], zero between calls
    int d, n, experts, size, activation;
};

// index[k]: the kept experts in order. Returns how many there are. scratch holds 8 * WARPS integers.
__device__ int list_experts(const unsigned char* keep, int experts, u16* index, int* scratch) {
    const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5;
    int listed = 0;
    for (int start = 0; start < experts; start += 8 * THREADS) {
        u32 kept[8];
#pragma unroll
        for (int t = 0; t < 8; t++) {  // all loads first
            const int e = start + t * THREADS + threadIdx.x;
            kept[t] = e < experts ? __ldcg(keep + e) : 0;
        }
#pragma unroll
        for (int t = 0; t < 8; t++) {
            kept[t] = __ballot_sync(FULL, kept[t] != 0);
            if (lane == 0) scratch[t * WARPS + warp] = __popc(kept[t]);
        }
        __syncthreads();
#pragma unroll
        for (int t = 0; t < 8; t++) {
            if (start + t * THREADS >= experts) break;
            int place = listed;
            for (int w = 0; w < WARPS; w++) {
                const int count = scratch[t * WARPS + w];
                listed += count;
                if (w < warp) place += count;
            }
            if (kept[t] >> lane & 1) index[place + __popc(kept[t] & ((1u << lane) - 1))] = (u16)(start + t * THREADS + threadIdx.x);
        }
        __syncthreads();
    }
    return listed;
}

// The CTA's range [begin, end) of the listed neurons, their rows in the maps in `rows`. Returns begin.
__device__ int list_neurons(const Experts& a, int share, int shares, u16* index, int* scratch, int* rows, int* end) {
    const int listed = list_experts(a.keep, a.experts, index, scratch) * a.size;
    const int begin = (int)((long)listed * share / shares);
    *end = (int)((long)listed * (share + 1) / shares);
    for (int u = begin + threadIdx.x; u < *end; u += THREADS) rows[u - begin] = index[u / a.size] * a.size + u % a.size;
    __syncthreads();
    return begin;
}

// Grid: (shares of the listed neurons, 1). A warp takes a piece (256 * LOADS columns) of one neuron, of both maps, the next
// one on its way meanwhile; the warps of the CTA take turns, so that none waits for one with a neuron more.
template <bool GATED>
__device__ void hidden_neurons(const Experts& a) {
    SHARED
    const int chunks = a.d / 8, pieces = (a.d + 256 * LOADS - 1) / (256 * LOADS);
    const int most = (a.experts * a.size + gridDim.x - 1) / gridDim.x;
    float4* x = (float4*)shared;                  // [2][chunks]: lower and upper halves of 8 values, without bank conflicts
    float* part = (float*)(x + 2 * chunks);       // [most][pieces][2]
    int* rows = (int*)(part + 2 * most * pieces);  // [most]
    int* scratch = rows + most;                   // [8 * WARPS]
    u16* index = (u16*)(scratch + 8 * WARPS);     // [experts]
    const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5;
    wait_for_previous();
    let_next_start();
    for (int c = threadIdx.x; c < chunks; c += THREADS) {
        float v[8];
        widen8(((const uint4*)a.x)[c], v);
        x[c] = make_float4(v[0], v[1], v[2], v[3]), x[chunks + c] = make_float4(v[4], v[5], v[6], v[7]);
    }
    int end;
    const int begin = list_neurons(a, blockIdx.x, gridDim.x, index, scratch, rows, &end);
    const int mine = (end - begin) * pieces;
    uint4 next[LOADS], next_up[LOADS];
    auto fetch = [&](int q) {
        const bool wanted = q < mine;
        const long row = wanted ? (long)rows[q / pieces] * a.d : 0;
        const int column = q % pieces * 256 * LOADS + lane * 8;
#pragma unroll
        for (int l = 0; l < LOADS; l++) next[l] = load_weight(a.first + row + column + l * 256, wanted && column + l * 256 < a.d);
        if (!GATED) return;
#pragma unroll
        for (int l = 0; l < LOADS; l++) next_up[l] = load_weight(a.up + row + column + l * 256, wanted && column + l * 256 < a.d);
    };
    fetch(warp);
    for (int q = warp; q < mine; q += WARPS) {
        uint4 now[LOADS], now_up[LOADS];
#pragma unroll
        for (int l = 0; l < LOADS; l++) {
            now[l] = next[l];
            if (GATED) now_up[l] = next_up[l];
        }
        fetch(q + WARPS);
        const int first = q % pieces * 32 * LOADS + lane;
        float z = 0, u = 0;
#pragma unroll
        for (int l = 0; l < LOADS; l++) {
            const int c = first + l * 32;
            if (c >= chunks) continue;
            const float4 low = x[c], high = x[chunks + c];
            float v[8];
            widen8(now[l], v);
            z += v[0] * low.x + v[1] * low.y + v[2] * low.z + v[3] * low.w;
            z += v[4] * high.x + v[5] * high.y + v[6] * high.z + v[7] * high.w;
            if (!GATED) continue;
            widen8(now_up[l], v);
            u += v[0] * low.x + v[1] * low.y + v[2] * low.z + v[3] * low.w;
            u += v[4] * high.x + v[5] * high.y + v[6] * high.z + v[7] * high.w;
        }
        z = warp_sum(z);
        if (GATED) u = warp_sum(u);
        if (lane == 0) part[2 * q] = z, part[2 * q + 1] = u;
    }
    __syncthreads();
    for (int i = threadIdx.x; i < end - begin; i += THREADS) {
        float z = a.first_bias ? widen(a.first_bias[rows[i]]) : 0.0f, u = GATED && a.up_bias ? widen(a.up_bias[rows[i]]) : 0.0f;
        for (int p = 0; p < pieces; p++) z += part[2 * (i * pieces + p)], u += part[2 * (i * pieces + p) + 1];
        z = activate(z, a.activation);
        a.hidden[begin + i] = GATED ? z * u : z;
    }
}

ENTRY expert_hidden(Experts a) { hidden_neurons<false>(a); }
ENTRY expert_hidden_gated(Experts a) { hidden_neurons<true>(a); }

// Grid: (tiles of the outputs, shares of the listed neurons). As gather, but what to read is known before the kernel in
// front has finished (keep is older), so the first rows are on their way while it drains.
ENTRY expert_last(Experts a) {
    SHARED
    const int most = (a.experts * a.size + gridDim.y - 1) / gridDim.y;
    uint4* ring = (uint4*)shared;   // [LOADS][WIDE][THREADS]: a thread reads what it copied itself
    float* sums = (float*)shared;   // [WARPS][TILE], when the ring is done with
    float* value = (float*)(ring + (LOADS > 2 ? LOADS : 2) * WIDE * THREADS);  // [most]
    int* rows = (int*)(value + most);          // [most]
    int* scratch = rows + most;                // [8 * WARPS]
    u16* index = (u16*)(scratch + 8 * WARPS);  // [experts]
    const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5;
    const int tile = blockIdx.x, column = tile * TILE + lane * 8;
    int end;
    const int begin = list_neurons(a, blockIdx.y, gridDim.y, index, scratch, rows, &end);
    const int n = end - begin, mine = n > warp ? (n - warp + WARPS - 1) / WARPS : 0;  // neurons warp, warp + WARPS, ...
    auto fetch = [&](int t) {
        const bool wanted = t < mine;
        const u16* row = a.last + (long)(wanted ? rows[warp + t * WARPS] : 0) * a.n + column;
#pragma unroll
        for (int d = 0; d < WIDE; d++)
            copy_weight(ring + ((t % LOADS) * WIDE + d) * THREADS + threadIdx.x, row + d * 256, wanted && column + d * 256 < a.n);
        close_group();
    };
#pragma unroll
    for (int t = 0; t < LOADS; t++) fetch(t);
    wait_for_previous();
    let_next_start();
    for (int i = threadIdx.x; i < n; i += THREADS) value[i] = __ldcg(a.hidden + begin + i);
    __syncthreads();
    float sum[8 * WIDE];
#pragma unroll
    for (int i = 0; i < 8 * WIDE; i++) sum[i] = 0;
    add_rows(sum, ring, value, mine, fetch);
    if (n) add_warps(sum, sums, a.sums, tile, a.n);
    round_last(a.sums, a.result, a.last_bias, a.arrived, scratch, tile, a.n);
}
