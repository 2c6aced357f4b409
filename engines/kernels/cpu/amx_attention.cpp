// Attention on AMX: the rows of a request that share a key/value head, up to sixteen queries, over a part of its context.
//
// As FlashAttention (Dao et al. 2022, arXiv:2205.14135), `kStep` tokens at a time: scores as K Q^T, so that keys are A as they
// lie in the cache, a token's scores are one vector whose lanes are queries, and softmax never crosses lanes; then P V, for
// which weights are transposed and values of neighbouring tokens interleaved. Queries and weights are rounded to
// bfloat16, sums and the softmax are float32.
//
// Steps begin at multiples of kStep and what a query does not see adds zero, so a query's result is the same bits
// whichever others are beside it.
#include "amx.h"
#include "attention.h"

#include <algorithm>
#include <cmath>

namespace lathe {

#if LATHE_AMX

namespace {

constexpr int kStep = 64;
constexpr int kMaxTiles = 8;  // head_dim / 32

// Two vectors of bfloat16, element by element: the first or the last sixteen of each.
LATHE_INLINE u16x32 interleave_low(u16x32 a, u16x32 b) {
    return __builtin_shufflevector(a, b, 0, 32, 1, 33, 2, 34, 3, 35, 4, 36, 5, 37, 6, 38, 7, 39, 8, 40, 9,
                                   41, 10, 42, 11, 43, 12, 44, 13, 45, 14, 46, 15, 47);
}

LATHE_INLINE u16x32 interleave_high(u16x32 a, u16x32 b) {
    return __builtin_shufflevector(a, b, 16, 48, 17, 49, 18, 50, 19, 51, 20, 52, 21, 53, 22, 54, 23, 55,
                                   24, 56, 25, 57, 26, 58, 27, 59, 28, 60, 29, 61, 30, 62, 31, 63);
}

}  // namespace

void attend_with_amx(const LatheModel& model, const LatheLayer& layer, const LatheBatch& batch,
                     const AttentionPiece& piece, int kv_head, const float* qkv_TA, int qkv_stride,
                     float* partial) {
    const int head_dim = model.head_dim, num_tiles = head_dim / kDepth;
    const int group = layer.num_heads / layer.num_kv_heads, num_queries = piece.num_rows * group;
    const int32_t* table = batch.block_tables_SB + size_t(piece.request) * batch.max_blocks;
    const size_t token_stride = size_t(layer.num_kv_heads) * head_dim;
    const size_t block_stride = kBlock * token_stride;
    const auto* keys = static_cast<const uint16_t*>(layer.key_cache) + size_t(kv_head) * head_dim;
    const auto* values = static_cast<const uint16_t*>(layer.value_cache) + size_t(kv_head) * head_dim;

    // What each query sees, and all of them.
    i32x16 first_seen{}, last_seen{};
    for (int query = 0; query < kLanes; query++) {
        const int row = piece.row + std::min(query / group, piece.num_rows - 1);
        last_seen[query] = int(batch.positions_T[row]);
        first_seen[query] = layer.window ? std::max(0, last_seen[query] - layer.window + 1) : 0;
    }
    const int begin = std::max(piece.part * kPartTokens, first_seen[0] / kStep * kStep);
    const int end = std::min((piece.part + 1) * kPartTokens, last_seen[kLanes - 1] + 1);

    alignas(64) uint16_t queries[kMaxTiles * kTile];  // B: pairs of dimensions of sixteen queries
    for (int query = 0; query < num_queries; query++) {
        const float* from = qkv_TA + size_t(piece.row + query / group) * qkv_stride +
                            size_t(kv_head * group + query % group) * head_dim;
        for (int tile = 0; tile < num_tiles; tile++, from += kDepth) {
            const u32x16 pairs = (u32x16)pack_bf16(load_lanes(from), load_lanes(from + kLanes));
            for (int pair = 0; pair < kLanes; pair++)
                reinterpret_cast<u32x16*>(queries + tile * kTile)[pair][query] = pairs[pair];
        }
    }

    const f32x16 scale = splat(1 / std::sqrt(float(head_dim)));
    f32x16 peak = splat(kMasked), total{};
    alignas(64) float sums[kLanes][2 * kMaxTiles][kLanes] = {};  // [query][sixteen dimensions]
    alignas(64) float scores[kStep][kLanes];                    // [token][query]
    alignas(64) uint16_t weights[kStep / kDepth][kTile];        // A: [query][token]
    alignas(64) uint16_t pairs[kStep / kDepth][2 * kMaxTiles][kTile];  // B: values of two tokens
    alignas(64) float products[2 * kMaxTiles][kLanes][kLanes];
    Tiles tiles;
    tiles.configure(kLanes, 64);
    for (int step = begin; step < end; step += kStep) {
        const int num_tokens = std::min(kStep, end - step), num_blocks = (num_tokens + kBlock - 1) / kBlock;
        const int num_halves = (num_blocks + 1) / 2;
        for (int half = 0; half < num_halves; half++) {
            const int block = 2 * half, next = std::min(block + 1, num_blocks - 1);
            const uint16_t* key_0 = keys + table[step / kBlock + block] * block_stride;
            const uint16_t* key_1 = keys + table[step / kBlock + next] * block_stride;
            tile_zero<0>(), tile_zero<1>();
            for (int tile = 0; tile < num_tiles; tile++) {
                tile_load<6>(queries + tile * kTile, 64);
                tile_load<4>(key_0 + tile * kDepth, 2 * token_stride);
                multiply_bf16<0, 4, 6>();
                tile_load<5>(key_1 + tile * kDepth, 2 * token_stride);
                multiply_bf16<1, 5, 6>();
            }
            tile_store<0>(scores[block * kBlock]);
            tile_store<1>(scores[(block + 1) * kBlock]);
        }

        f32x16 step_peak = peak;
        for (int token = 0; token < num_halves * kDepth; token++) {
            const i32x16 position = i32x16{} + (step + token);
            const i32x16 is_seen = (position >= first_seen) & (position <= last_seen);
            const f32x16 score = is_seen ? load_lanes(scores[token]) * scale : splat(kMasked);
            store_lanes(scores[token], score);
            step_peak = maximum(step_peak, score);
        }
        const f32x16 keep = exponential(peak - step_peak);
        peak = step_peak;
        f32x16 step_total{};
        for (int half = 0; half < num_halves; half++) {
            u32x16 rows[kLanes];
            for (int pair = 0; pair < kLanes; pair++) {
                f32x16 weight[2];
                for (int i = 0; i < 2; i++) {
                    const f32x16 score = load_lanes(scores[half * kDepth + 2 * pair + i]);
                    weight[i] = score > kMasked ? exponential(score - peak) : f32x16{};
                    step_total += weight[i];
                }
                const u16x32 packed = pack_bf16(weight[0], weight[1]);
                rows[pair] = (u32x16)interleave_low(
                    packed, __builtin_shufflevector(packed, packed, 16, 17, 18, 19, 20, 21, 22, 23, 24, 25, 26,
                                                    27, 28, 29, 30, 31, 0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11,
                                                    12, 13, 14, 15));
            }
            transpose(rows);
            std::memcpy(weights[half], rows, sizeof rows);
            for (int pair = 0; pair < kLanes; pair++) {
                const int token = half * kDepth + 2 * pair;
                // Nobody has written past the end, and zero times what is there may not be zero.
                const uint16_t* from = values + token % kBlock * token_stride;
                if (token < num_tokens) from += table[(step + token) / kBlock] * block_stride;
                for (int tile = 0; tile < num_tiles; tile++) {
                    const u16x32 even = token < num_tokens ? load<u16x32>(from + tile * kDepth) : u16x32{};
                    const u16x32 odd = token + 1 < num_tokens
                                           ? load<u16x32>(from + token_stride + tile * kDepth)
                                           : u16x32{};
                    store(pairs[half][2 * tile] + pair * kDepth, interleave_low(even, odd));
                    store(pairs[half][2 * tile + 1] + pair * kDepth, interleave_high(even, odd));
                }
            }
        }
        total = fma(total, keep, step_total);

        tile_load<4>(weights[0], 64);
        if (num_halves > 1) tile_load<5>(weights[1], 64);
        for (int tile = 0; tile < num_tiles; tile++) {
            tile_zero<2>(), tile_zero<3>();
            tile_load<6>(pairs[0][2 * tile], 64);
            multiply_bf16<2, 4, 6>();
            tile_load<7>(pairs[0][2 * tile + 1], 64);
            multiply_bf16<3, 4, 7>();
            if (num_halves > 1) {
                tile_load<6>(pairs[1][2 * tile], 64);
                multiply_bf16<2, 5, 6>();
                tile_load<7>(pairs[1][2 * tile + 1], 64);
                multiply_bf16<3, 5, 7>();
            }
            tile_store<2>(products[2 * tile]), tile_store<3>(products[2 * tile + 1]);
        }
        for (int query = 0; query < num_queries; query++)
            for (int lanes = 0; lanes < 2 * num_tiles; lanes++)
                store_lanes(sums[query][lanes], fma(load_lanes(sums[query][lanes]), splat(keep[query]),
                                                    load_lanes(products[lanes][query])));
    }

    for (int query = 0; query < num_queries; query++) {
        float* to = partial + (size_t(query / group) * layer.num_heads + query % group) * (head_dim + 2);
        to[0] = peak[query];
        to[1] = total[query];
        std::memcpy(to + 2, sums[query], head_dim * sizeof(float));
    }
}

#else

void attend_with_amx(const LatheModel&, const LatheLayer&, const LatheBatch&, const AttentionPiece&, int,
                     const float*, int, float*) {
    __builtin_unreachable();
}

#endif

}  // namespace lathe
