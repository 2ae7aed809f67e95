// Attention of one new token per sequence over the key-value groups that its sequence keeps (_heads_cuda.py launches it).
//
// Query and cache are as the model left them: rotated, the new position written. A group that is dropped reads nothing of
// its cache; its heads give zeros. CTA (sequence and group, split of the context); a position is read by HEAD_DIM / 8
// lanes (a team), 16 bytes each, once for all query heads of the group; teams keep running softmaxes that are merged by
// shuffles, in shared memory, and by the last CTA of a pair to arrive.
#include "decode.cu"

struct Heads {
    const u16* q;                // [B, groups * GROUP, HEAD_DIM]
    const u16 *keys, *values;    // [B, groups, positions, HEAD_DIM]
    const unsigned char* keep;   // [B, groups]
    const int* length;           // [B]: positions that hold tokens, the new one among them
    u16* out;                    // as q
    float* partial;              // [B * groups, SPLITS, GROUP, HEAD_DIM + 2]
    u32* arrived;                // [B * groups], zero between calls
    int groups, positions;
    float scaling;
};

#define SLOT (HEAD_DIM + 2)  // sums of values, maximum, sum of weights

// Sum of `count` partial results of one head, which lie `step` floats apart, at channel i.
__device__ __forceinline__ void merge(const float* part, int count, int step, int i, float* top, float* weight, float* mixed) {
    *top = -1e30f, *weight = 0, *mixed = 0;
    for (int s = 0; s < count; s++) *top = fmaxf(*top, __ldcg(part + s * step + HEAD_DIM));
    for (int s = 0; s < count; s++) {
        const float fade = __expf(__ldcg(part + s * step + HEAD_DIM) - *top);
        *weight += __ldcg(part + s * step + HEAD_DIM + 1) * fade, *mixed += __ldcg(part + s * step + i) * fade;
    }
}

// Grid: (sequences * groups, SPLITS).
ENTRY attend_kept(Heads a) {
    SHARED
    float* query = (float*)shared;             // [GROUP][HEAD_DIM], scaled
    float* merged = query + GROUP * HEAD_DIM;  // [WARPS][GROUP][SLOT]
    int* is_last = (int*)(merged + WARPS * GROUP * SLOT);
    const int pair = blockIdx.x, split = blockIdx.y, team = threadIdx.x / TEAM, d = threadIdx.x % TEAM * 8, warp = threadIdx.x >> 5;
    wait_for_previous();
    let_next_start();
    u16* out = a.out + (long)pair * GROUP * HEAD_DIM;
    if (!a.keep[pair]) {
        for (int i = threadIdx.x; i < GROUP * HEAD_DIM && split == 0; i += THREADS) out[i] = narrow(0.0f);
        return;
    }
    const int length = a.length[pair / a.groups];
    const int first = (int)((long)length * split / SPLITS), last = (int)((long)length * (split + 1) / SPLITS);
    const u16* keys = a.keys + (long)pair * a.positions * HEAD_DIM;
    const u16* values = a.values + (long)pair * a.positions * HEAD_DIM;
    const int rounds = (last - first + TEAMS * LOADS - 1) / (TEAMS * LOADS);  // as many for all lanes: shuffles need whole warps
    uint4 next_key[LOADS], next_value[LOADS];
    auto fetch = [&](int round) {
#pragma unroll
        for (int l = 0; l < LOADS; l++) {
            const int p = first + (round * LOADS + l) * TEAMS + team;
            next_key[l] = load_cached(keys + (long)p * HEAD_DIM + d, p < last);
            next_value[l] = load_cached(values + (long)p * HEAD_DIM + d, p < last);
        }
    };
    fetch(0);
    for (int i = threadIdx.x; i < GROUP * HEAD_DIM; i += THREADS) query[i] = widen(a.q[(long)pair * GROUP * HEAD_DIM + i]) * a.scaling;
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
        float* mine = merged + (warp * GROUP + g) * SLOT;
        if ((threadIdx.x & 31) < TEAM)
#pragma unroll
            for (int i = 0; i < 8; i++) mine[d + i] = sum[g][i];
        if ((threadIdx.x & 31) == 0) mine[HEAD_DIM] = top[g], mine[HEAD_DIM + 1] = weight[g];
    }
    __syncthreads();
    float* slots = a.partial + (long)pair * SPLITS * GROUP * SLOT;
    for (int i = threadIdx.x; i < GROUP * HEAD_DIM; i += THREADS) {  // warps of the CTA
        const int g = i / HEAD_DIM;
        float higher = -1e30f, total = 0, mixed = 0;
        for (int w = 0; w < WARPS; w++) higher = fmaxf(higher, merged[(w * GROUP + g) * SLOT + HEAD_DIM]);
        for (int w = 0; w < WARPS; w++) {
            const float* other = merged + (w * GROUP + g) * SLOT;
            const float share = __expf(other[HEAD_DIM] - higher);
            total += other[HEAD_DIM + 1] * share, mixed += other[i % HEAD_DIM] * share;
        }
        float* mine = slots + (split * GROUP + g) * SLOT;
        mine[i % HEAD_DIM] = mixed;
        if (i % HEAD_DIM == 0) mine[HEAD_DIM] = higher, mine[HEAD_DIM + 1] = total;
    }
    __threadfence();
    __syncthreads();
    if (threadIdx.x == 0) *is_last = atomicAdd(a.arrived + pair, 1u) == SPLITS - 1;
    __syncthreads();
    if (!*is_last) return;
    __threadfence();
    for (int i = threadIdx.x; i < GROUP * HEAD_DIM; i += THREADS) {  // splits of the context
        float higher, total, mixed;
        merge(slots + i / HEAD_DIM * SLOT, SPLITS, GROUP * SLOT, i % HEAD_DIM, &higher, &total, &mixed);
        out[i] = narrow(mixed / total);
    }
    if (threadIdx.x == 0) a.arrived[pair] = 0;
}
