// An input-sparse product of few rows: y[b] = W (x[b] where |x[b]| c > t) + bias, b < 16 (cuda_rows.py launches it).
//
// A weight row is read once for all rows of x, if any of them keeps its channel (the union); a row that dropped the channel
// has the value 0 there, so each row's own mask holds exactly. As gather of decode.cu, whose parts it uses: a CTA takes
// TILE outputs and one of several equal shares of the channels, and compacts the union of its share into shared memory,
// with the values of all rows side by side. Sums are fp32; the last CTA of a tile adds the bias and rounds.
//
// One kernel per number of rows it has registers for: 2, 4, 8, 16 (further ones of a smaller batch are zeros, not read).
#include "decode.cu"

struct FewRows {
    const u16* weight;       // [n, m]
    const u16* input;        // [rows, n]
    const float* threshold;  // one number; below 0 keeps everything
    const float* scale;      // [n] or null
    const u16* bias;         // [m] or null
    float* sums;             // [rows, m], zero between calls
    u16* result;             // [rows, m]
    u32* arrived;            // [tiles], zero between calls
    int m, n, rows;
};

// The last CTA of a tile to arrive rounds the sums of all rows and leaves sums and counter at zero for the next call.
__device__ __forceinline__ void round_rows(const FewRows& a, int* last, int tile) {
    __threadfence();
    __syncthreads();
    if (threadIdx.x == 0) *last = atomicAdd(a.arrived + tile, 1u) == gridDim.y - 1;
    __syncthreads();
    if (!*last) return;
    __threadfence();
    const int end = min(a.m, (tile + 1) * TILE);
    for (int b = 0; b < a.rows; b++)
        for (int i = tile * TILE + threadIdx.x; i < end; i += THREADS) {
            const long at = (long)b * a.m + i;
            a.result[at] = narrow(__ldcg(a.sums + at) + (a.bias ? widen(a.bias[i]) : 0.0f));
            a.sums[at] = 0;
        }
    if (threadIdx.x == 0) a.arrived[tile] = 0;
}

// Grid: (tiles, shares of the channels).
template <int ROWS>
__device__ void few_rows(const FewRows& a) {
    constexpr int ITEMS = 2;  // channels a thread looks at together
    constexpr int CHUNK = ITEMS * THREADS;
    SHARED
    uint4* ring = (uint4*)shared;                            // [LOADS][WIDE][THREADS]: a thread reads what it copied itself
    float* sums = (float*)shared;                            // [WARPS][TILE], when the ring is done with
    float* value = (float*)(ring + LOADS * WIDE * THREADS);  // [CHUNK][ROWS]
    u16* index = (u16*)(value + CHUNK * ROWS);               // [CHUNK], relative to the chunk
    int* count = (int*)(index + CHUNK);
    const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5;
    const int tile = blockIdx.x, column = tile * TILE + lane * 8;
    const int first = (int)((long)a.n * blockIdx.y / gridDim.y), last = (int)((long)a.n * (blockIdx.y + 1) / gridDim.y);
    float sum[ROWS][8 * WIDE];
#pragma unroll
    for (int b = 0; b < ROWS; b++)
#pragma unroll
        for (int i = 0; i < 8 * WIDE; i++) sum[b][i] = 0;
    wait_for_previous();
    let_next_start();
    const float threshold = *a.threshold;
    for (int chunk = first; chunk < last; chunk += CHUNK) {
        const int size = min(CHUNK, last - chunk);
        if (threadIdx.x == 0) *count = 0;
        __syncthreads();
        float x[ITEMS][ROWS];
        u32 kept[ITEMS];
        int total = 0;
#pragma unroll
        for (int t = 0; t < ITEMS; t++) {  // all loads first
            const int i = t * THREADS + threadIdx.x;
#pragma unroll
            for (int b = 0; b < ROWS; b++) x[t][b] = i < size && b < a.rows ? widen(a.input[(long)b * a.n + chunk + i]) : 0.0f;
        }
#pragma unroll
        for (int t = 0; t < ITEMS; t++) {
            const int i = t * THREADS + threadIdx.x;
            const float factor = a.scale && i < size ? a.scale[chunk + i] : 1.0f;
            bool any = false;
#pragma unroll
            for (int b = 0; b < ROWS; b++) {
                const bool mine = i < size && b < a.rows && fabsf(x[t][b]) * factor > threshold;
                x[t][b] = mine ? x[t][b] : 0.0f;
                any = any || mine;
            }
            kept[t] = __ballot_sync(FULL, any);
            total += __popc(kept[t]);
        }
        int place = 0;
        if (lane == 0 && total) place = atomicAdd(count, total);
        place = __shfl_sync(FULL, place, 0);
#pragma unroll
        for (int t = 0; t < ITEMS; t++) {
            if (kept[t] >> lane & 1) {
                const int at = place + __popc(kept[t] & ((1u << lane) - 1));
                index[at] = (u16)(t * THREADS + threadIdx.x);
#pragma unroll
                for (int b = 0; b < ROWS; b++) value[at * ROWS + b] = x[t][b];
            }
            place += __popc(kept[t]);
        }
        __syncthreads();
        const int channels = *count;
        const int mine = channels > warp ? (channels - warp + WARPS - 1) / WARPS : 0;  // of this warp: warp, warp + WARPS, ...
        const u16* rows = a.weight + (long)chunk * a.m + column;
        auto fetch = [&](int t) {
            const bool wanted = t < mine;
            const u16* row = rows + (long)(wanted ? index[warp + t * WARPS] : 0) * a.m;
#pragma unroll
            for (int d = 0; d < WIDE; d++)
                copy_weight(ring + ((t % LOADS) * WIDE + d) * THREADS + threadIdx.x, row + d * 256, wanted && column + d * 256 < a.m);
            close_group();
        };
#pragma unroll
        for (int t = 0; t < LOADS; t++) fetch(t);
        for (int t = 0; t < mine; t++) {
            wait_group<LOADS - 1>();
            const float* own = value + (warp + t * WARPS) * ROWS;
#pragma unroll
            for (int d = 0; d < WIDE; d++) {
                float w[8];
                widen8(ring[((t % LOADS) * WIDE + d) * THREADS + threadIdx.x], w);
#pragma unroll
                for (int b = 0; b < ROWS; b++) {
                    const float v = own[b];
#pragma unroll
                    for (int i = 0; i < 8; i++) sum[b][8 * d + i] += v * w[i];
                }
            }
            fetch(t + LOADS);
        }
        wait_group<0>();
        __syncthreads();
    }
#pragma unroll
    for (int b = 0; b < ROWS; b++) {  // unrolled, so that sums stay in registers
        if (b < a.rows) add_warps(sum[b], sums, a.sums + (long)b * a.m, tile, a.m);
        __syncthreads();
    }
    round_rows(a, count, tile);
}

ENTRY few_rows_2(FewRows a) { few_rows<2>(a); }
ENTRY few_rows_4(FewRows a) { few_rows<4>(a); }
ENTRY few_rows_8(FewRows a) { few_rows<8>(a); }
ENTRY few_rows_16(FewRows a) { few_rows<16>(a); }
