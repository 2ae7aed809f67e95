// The products of decode.cu's `gather` with weights in 8 or 4 bits (BITS), stored as kernels/_packed.py says. Part of decode.cu.
//
// The stored integers become floats without a conversion instruction: put into the mantissa of 2^23, of which 2^23 is taken
// away again, they are exact at whatever place of the mantissa they stood; a power of two in the value makes good for the
// place. Sums are fp32 throughout.
//
// Scales are applied to the sums of a CTA, after its warps were brought together: so a CTA's share of the channels lies inside
// one group of input channels (`group`; all n for int8). Grid: (tiles of all parts, groups x pieces of a group).

#define PER (128 / BITS)                // outputs in 16 bytes
#define PACKED_TILE (32 * PER * WIDE)
#define PACKED_RING (LOADS * 4 > PER ? LOADS * 4 : PER)  // floats a thread needs: its rows in flight, later its sums

struct PackedGather {
    Gather of;                   // its weight: q, by bytes
    const void* scales[PARTS];   // fp16 [groups, m], or float [m] (int8)
    const u16* zeros[PARTS];     // fp16 [groups, m], or null: 8
    int stride[PARTS];           // bytes of a channel
    int group, halves;           // inputs of a group; whether scales are fp16 [groups, m]
};

#define MAGIC 0x4b000000u  // 2^23

// sum[PER] += x * q for the 16 bytes of one channel.
__device__ __forceinline__ void axpy_packed(float* sum, uint4 bytes, float x) {
    const u32 words[4] = {bytes.x, bytes.y, bytes.z, bytes.w};
#if BITS == 8
    const float up = x * 0.00390625f;  // for a byte one place higher
#pragma unroll
    for (int w = 0; w < 4; w++) {
        const u32 low = words[w] ^ 0x80808080u, high = low >> 16;  // q + 128
        sum[4 * w] += x * (__uint_as_float((low & 0xffu) | MAGIC) - 8388736.0f);
        sum[4 * w + 1] += up * (__uint_as_float((low & 0xff00u) | MAGIC) - 8421376.0f);
        sum[4 * w + 2] += x * (__uint_as_float((high & 0xffu) | MAGIC) - 8388736.0f);
        sum[4 * w + 3] += up * (__uint_as_float((high & 0xff00u) | MAGIC) - 8421376.0f);
    }
#else
    float place[5];  // x / 16^j
    place[0] = x;
#pragma unroll
    for (int j = 1; j < 5; j++) place[j] = place[j - 1] * 0.0625f;
#pragma unroll
    for (int w = 0; w < 4; w++) {
#pragma unroll
        for (int j = 0; j < 8; j++) {  // nibble j of word w
            const int at = j < 5 ? j : j - 5;
            const u32 word = j < 5 ? words[w] : words[w] >> 20;
            const float q = __uint_as_float((word & (0xfu << 4 * at)) | MAGIC) - (8388608.0f + (float)(8u << 4 * at));
            sum[4 * j + w] += place[at] * q;
        }
    }
#endif
}

// Where the 4 outputs i, i + 1, ... of a lane's PER stand in its CTA's tile.
__device__ __forceinline__ int place_of(int d, int lane, int i) {
#if BITS == 8
    return d * 32 * PER + lane * PER + i;
#else
    return d * 32 * PER + (lane >> 1) * 64 + (i >> 2) * 8 + (lane & 1) * 4;
#endif
}

__device__ __forceinline__ float4 four_halves(const u16* p) {
    const u32 low = ((const u32*)p)[0], high = ((const u32*)p)[1];
    return make_float4(half_to_float((u16)low), half_to_float((u16)(low >> 16)), half_to_float((u16)high), half_to_float((u16)(high >> 16)));
}

// out[tile] += scale * (the warps' sums - (zero - 8) * the sum of the values), one group's share of it.
__device__ __forceinline__ void add_scaled(const PackedGather& q, int part, int group, const float* sum, float* sums, float values, int tile) {
    const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5, m = q.of.m[part];
#pragma unroll
    for (int d = 0; d < WIDE; d++) {
#pragma unroll
        for (int i = 0; i < PER; i += 4) {
            const float* mine = sum + d * PER + i;
            *(float4*)(sums + warp * PACKED_TILE + place_of(d, lane, i)) = make_float4(mine[0], mine[1], mine[2], mine[3]);
        }
    }
    __syncthreads();
    for (int i = threadIdx.x; i < PACKED_TILE / 4; i += THREADS) {
        const int j = tile * PACKED_TILE + i * 4;
        if (j >= m) continue;
        float4 whole = ((float4*)sums)[i];
        for (int w = 1; w < WARPS; w++) {
            const float4 other = ((float4*)(sums + w * PACKED_TILE))[i];
            whole.x += other.x, whole.y += other.y, whole.z += other.z, whole.w += other.w;
        }
        const float4 s = BITS == 8 && !q.halves ? *(const float4*)((const float*)q.scales[part] + j) : four_halves((const u16*)q.scales[part] + (long)group * m + j);
#if BITS == 4
        if (q.zeros[part]) {
            const float4 z = four_halves(q.zeros[part] + (long)group * m + j);
            whole.x -= (z.x - 8) * values, whole.y -= (z.y - 8) * values, whole.z -= (z.z - 8) * values, whole.w -= (z.w - 8) * values;
        }
#endif
        add4(q.of.out[part] + j, make_float4(whole.x * s.x, whole.y * s.y, whole.z * s.z, whole.w * s.w));
    }
}

template <int MODE>
__device__ void gather_packed(const PackedGather& q) {
    constexpr int ITEMS = MODE == ATTENTION ? 1 : 8, CHUNK = ITEMS * THREADS;
    SHARED
    const Gather& a = q.of;
    uint4* ring = (uint4*)shared;                   // [LOADS][WIDE][THREADS]: a thread reads what it copied itself
    float* sums = (float*)shared;                   // [WARPS][PACKED_TILE], when the ring is done with
    float* value = sums + PACKED_RING * WIDE * THREADS;  // [CHUNK] (the host reserves 8 * THREADS)
    u16* index = (u16*)(value + CHUNK);             // [CHUNK], relative to the chunk
    int* count = (int*)(index + CHUNK);
    float* scratch = (float*)(count + 4);           // [WARPS]
    const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5;
    int tile = blockIdx.x, part = 0;
    while (tile >= (a.m[part] + PACKED_TILE - 1) / PACKED_TILE) tile -= (a.m[part++] + PACKED_TILE - 1) / PACKED_TILE;
    const int n = a.n[part], stride = q.stride[part], column = tile * 512 * WIDE + lane * 16;  // in bytes
    const float* input = a.input[part];
    const int pieces = gridDim.y / ((n + q.group - 1) / q.group), group = blockIdx.y / pieces, piece = blockIdx.y % pieces;
    const int size_of_group = min(q.group, n - group * q.group);
    const int first = group * q.group + (int)((long)size_of_group * piece / pieces);
    const int last = group * q.group + (int)((long)size_of_group * (piece + 1) / pieces);
    float sum[PER * WIDE], inverse = 0, values = 0;
#pragma unroll
    for (int i = 0; i < PER * WIDE; i++) sum[i] = 0;
    for (int i = threadIdx.x * 32; i < PACKED_TILE && tile * PACKED_TILE + i < a.m[part]; i += THREADS * 32)
        prefetch((const char*)q.scales[part] + (q.halves ? ((long)group * a.m[part] + tile * PACKED_TILE + i) * 2 : ((long)tile * PACKED_TILE + i) * 4));
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
    const float* scale = a.scale[part];
    begin();
    const int row_bytes = min(512 * WIDE, stride - tile * 512 * WIDE);
    const Limit limit = limit_of<MODE>(a, part, inverse, first, last, (const char*)a.weight[part] + tile * 512 * WIDE, stride, row_bytes);
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
            kept[t] = __ballot_sync(FULL, i < size && passes(limit, x[t], magnitude, chunk + i));
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
                values += x[t];
            }
            place += __popc(kept[t]);
        }
        __syncthreads();
        channels = *count;
#endif
        const unsigned char* rows = (const unsigned char*)a.weight[part] + (long)chunk * stride + column;
        const int mine = channels > warp ? (channels - warp + WARPS - 1) / WARPS : 0;  // of this warp: warp, warp + WARPS, ...
        auto fetch = [&](int t) {
            const bool wanted = t < mine;
#ifdef DENSE
            const unsigned char* row = rows + (long)(wanted ? warp + t * WARPS : 0) * stride;
#else
            const unsigned char* row = rows + (long)(wanted ? index[warp + t * WARPS] : 0) * stride;
#endif
#pragma unroll
            for (int d = 0; d < WIDE; d++)
                copy_weight(ring + ((t % LOADS) * WIDE + d) * THREADS + threadIdx.x, row + d * 512, wanted && column + d * 512 < stride);
            close_group();
        };
#pragma unroll
        for (int t = 0; t < LOADS; t++) fetch(t);
#ifdef DENSE
        if (!begun) begin(), begun = true;
        for (int i = threadIdx.x; i < size; i += THREADS) values += value[i] = input_value<MODE>(a, input, chunk + i, inverse);
        __syncthreads();
#endif
        for (int t = 0; t < mine; t++) {
            wait_group<LOADS - 1>();
            const float v = value[warp + t * WARPS];
#pragma unroll
            for (int d = 0; d < WIDE; d++) axpy_packed(sum + d * PER, ring[((t % LOADS) * WIDE + d) * THREADS + threadIdx.x], v);
            fetch(t + LOADS);
        }
        wait_group<0>();
        __syncthreads();
    }
#ifdef DENSE
    if (!begun) begin();
#endif
    if (q.zeros[part]) values = block_sum(values, scratch);
    add_scaled(q, part, group, sum, sums, values, tile);
    if (a.result) round_last<PACKED_TILE>(a.out[0], a.result, a.bias, a.arrived, count, tile, a.m[0]);
}

ENTRY gather_packed_plain(PackedGather a) { gather_packed<PLAIN>(a); }
ENTRY gather_packed_norm(PackedGather a) { gather_packed<NORM>(a); }
ENTRY gather_packed_swiglu(PackedGather a) { gather_packed<SWIGLU>(a); }
ENTRY gather_packed_attention(PackedGather a) { gather_packed<ATTENTION>(a); }
ENTRY gather_packed_half(PackedGather a) { gather_packed<HALF>(a); }
