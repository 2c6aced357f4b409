// Paged attention for many rows on the vector units, for long passes where there is no AMX.
//
// As FlashAttention (Dao et al. 2022, arXiv:2205.14135): a tile of queries that share a key/value head sees its context
// `kStep` tokens at a time, which are made float32 once for all of them, keys with tokens in lanes. Both products keep
// kQueries x kVectors sums in registers, so each loaded vector is used kQueries times.
//
// Everything is float32. A query's sums do not depend on the queries beside it: steps begin at multiples of kStep, and
// what it does not see adds zero.
#include <algorithm>
#include <cmath>

#include "attention.h"
#include "simd.h"

namespace lathe {
namespace {

constexpr int kStep = 4 * kBlock;
constexpr int kQueries = 6;          // of a register tile: 24 sums, 4 vectors and a factor are 29 of 32 registers
constexpr int kVectors = 4;
constexpr int kTileQueries = 96;
constexpr double kValuesPerNanosecond = 16;  // of keys and as many of values, that a thread attends to

// What one thread works on.
struct Scratch {
    Buffer<float> queries, sums;   // (queries, D); queries are scaled
    Buffer<float> peaks, totals;   // (queries,)
    Buffer<float> keys;            // (D, kStep)
    Buffer<float> values;          // (kStep, D)
    alignas(64) float weights[kQueries * kStep];
};

// Sums of kQueries rows: sums[q][v] += sum over i of factors[q * stride + i] * rows[i * width + 16 v].
template <int vectors>
LATHE_INLINE void add_products(const float* factors, int stride, const float* rows, int width, int count,
                               f32x16 (&sums)[kQueries][vectors]) {
    for (int i = 0; i < count; i++) {
        f32x16 row[vectors];
#pragma GCC unroll 4
        for (int v = 0; v < vectors; v++) row[v] = load_lanes(rows + i * width + v * kLanes);
#pragma GCC unroll 6
        for (int q = 0; q < kQueries; q++) {
            const f32x16 factor = splat(factors[q * stride + i]);
#pragma GCC unroll 4
            for (int v = 0; v < vectors; v++) sums[q][v] = fma(factor, row[v], sums[q][v]);
        }
    }
}

// kStep tokens from `step` on as float32; what lies at `end` and behind is zero, since nobody has written there.
template <class Cache>
void load_step(const LatheModel& model, const LatheLayer& layer, const int32_t* table, int kv_head, int step,
               int end, Scratch& scratch) {
    const int head_dim = model.head_dim;
    const size_t token_stride = size_t(layer.num_kv_heads) * head_dim;
    for (int block = 0; block < kStep / kBlock; block++) {
        const int first = step + block * kBlock;
        const size_t start = first < end ? size_t(table[first / kBlock]) * kBlock * token_stride : 0;
        const auto* keys = static_cast<const Cache*>(layer.key_cache) + start + size_t(kv_head) * head_dim;
        const auto* values = static_cast<const Cache*>(layer.value_cache) + start + size_t(kv_head) * head_dim;
        for (int i = 0; i < head_dim; i += kLanes) {
            u32x16 tokens[kBlock];
            for (int token = 0; token < kBlock; token++) {
                const bool is_there = first + token < end;
                tokens[token] = is_there ? (u32x16)load_lanes(keys + token * token_stride + i) : u32x16{};
                store_lanes(scratch.values.data() + size_t(block * kBlock + token) * head_dim + i,
                            is_there ? load_lanes(values + token * token_stride + i) : f32x16{});
            }
            transpose(tokens);
            for (int lane = 0; lane < kLanes; lane++)
                store_lanes(scratch.keys.data() + size_t(i + lane) * kStep + block * kBlock,
                            (f32x16)tokens[lane]);
        }
    }
}

// The weights of kQueries queries from `query` on for a step, and what becomes of the sums before it.
LATHE_INLINE void weigh(int head_dim, int query, int step, const int (&first_seen)[kQueries],
                        const int (&last_seen)[kQueries], Scratch& scratch, float (&keep)[kQueries]) {
    f32x16 scores[kQueries][kVectors] = {};
    add_products<kVectors>(scratch.queries.data() + size_t(query) * head_dim, head_dim,
                           scratch.keys.data(), kStep, head_dim, scores);
    i32x16 lanes;
    for (int i = 0; i < kLanes; i++) lanes[i] = i;
    for (int q = 0; q < kQueries; q++) {
        f32x16 peak = splat(scratch.peaks[query + q]);
        const float before = peak[0];
        for (int v = 0; v < kVectors; v++) {
            const i32x16 position = lanes + (step + v * kLanes);
            const i32x16 is_seen = (position >= first_seen[q]) & (position <= last_seen[q]);
            scores[q][v] = is_seen ? scores[q][v] : splat(kMasked);
            peak = maximum(peak, scores[q][v]);
        }
        const float after = largest(peak);
        f32x16 total{};
        for (int v = 0; v < kVectors; v++) {
            const f32x16 weight =
                scores[q][v] > kMasked ? exponential(scores[q][v] - after) : f32x16{};
            store_lanes(scratch.weights + q * kStep + v * kLanes, weight);
            total += weight;
        }
        keep[q] = std::exp(before - after);
        scratch.peaks[query + q] = after;
        scratch.totals[query + q] = scratch.totals[query + q] * keep[q] + sum(total);
    }
}

template <int vectors>
LATHE_INLINE void add_values(int head_dim, int query, int dimension, const float (&keep)[kQueries],
                             Scratch& scratch) {
    f32x16 sums[kQueries][vectors];
    float* to = scratch.sums.data() + size_t(query) * head_dim + dimension;
    for (int q = 0; q < kQueries; q++)
        for (int v = 0; v < vectors; v++)
            sums[q][v] = load_lanes(to + q * head_dim + v * kLanes) * keep[q];
    add_products<vectors>(scratch.weights, kStep, scratch.values.data() + dimension, head_dim, kStep,
                          sums);
    for (int q = 0; q < kQueries; q++)
        for (int v = 0; v < vectors; v++) store_lanes(to + q * head_dim + v * kLanes, sums[q][v]);
}

// Rows [row, row + num_rows) of a request, the query heads of one key/value head.
template <class Value>
void attend_tile(const LatheModel& model, const LatheLayer& layer, const LatheBatch& batch, int request,
                 int row, int num_rows, int kv_head, const Value* queries_TND, Value* output_TND) {
    static thread_local Scratch scratch;
    const int head_dim = model.head_dim, group = layer.num_heads / layer.num_kv_heads;
    const int num_queries = num_rows * group;
    const float scale = 1 / std::sqrt(float(head_dim));
    const auto offset = [&](int query) {
        return (size_t(row + query / group) * layer.num_heads + kv_head * group + query % group) * head_dim;
    };
    const auto position = [&](int query) {
        return int(batch.positions_T[row + std::min(query, num_queries - 1) / group]);
    };
    const auto first_seen = [&](int query) {
        return layer.window ? std::max(0, position(query) - layer.window + 1) : 0;
    };
    const int padded = (num_queries + kQueries - 1) / kQueries * kQueries;
    grown(scratch.keys, size_t(head_dim) * kStep);
    grown(scratch.values, size_t(head_dim) * kStep);
    float* queries = grown(scratch.queries, size_t(padded) * head_dim);
    float* sums = grown(scratch.sums, size_t(padded) * head_dim);
    float* totals = grown(scratch.totals, padded);
    std::fill_n(sums, size_t(padded) * head_dim, 0.0f);
    std::fill_n(totals, padded, 0.0f);
    std::fill_n(grown(scratch.peaks, padded), padded, kMasked);
    for (int query = 0; query < padded; query++) {
        float* to = queries + size_t(query) * head_dim;
        for (int i = 0; i < head_dim; i += kLanes)
            store_lanes(to + i, query < num_queries
                                    ? load_lanes(queries_TND + offset(query) + i) * scale
                                    : f32x16{});
    }

    const int32_t* table = batch.block_tables_SB + size_t(request) * batch.max_blocks;
    const int end = position(num_queries - 1) + 1;
    for (int step = first_seen(0) / kStep * kStep; step < end; step += kStep) {
        load_step<Value>(model, layer, table, kv_head, step, end, scratch);
        for (int query = 0; query < padded; query += kQueries) {
            int first[kQueries], last[kQueries];
            for (int q = 0; q < kQueries; q++)
                first[q] = first_seen(query + q), last[q] = position(query + q);
            if (step > last[kQueries - 1] || step + kStep <= first[0]) continue;
            float keep[kQueries];
            weigh(head_dim, query, step, first, last, scratch, keep);
            int dimension = 0;
            for (; dimension + kVectors * kLanes <= head_dim; dimension += kVectors * kLanes)
                add_values<kVectors>(head_dim, query, dimension, keep, scratch);
            for (; dimension < head_dim; dimension += kLanes)
                add_values<1>(head_dim, query, dimension, keep, scratch);
        }
    }
    for (int query = 0; query < num_queries; query++)
        for (int i = 0; i < head_dim; i += kLanes)
            store_lanes(output_TND + offset(query) + i,
                        load_lanes(sums + size_t(query) * head_dim + i) / totals[query]);
}

struct Tile {
    int request, row, num_rows;
};

}  // namespace

void attend_long(Pool& pool, const LatheModel& model, const LatheLayer& layer, const LatheBatch& batch,
                 const void* queries_TND, void* output_TND) {
    const int rows_per_tile = std::max(1, kTileQueries / (layer.num_heads / layer.num_kv_heads));
    std::vector<Tile> tiles;
    double context = 0;
    for (int request = 0; request < batch.num_requests; request++) {
        const int end = batch.query_start_S1[request + 1];
        for (int row = batch.query_start_S1[request]; row < end; row += rows_per_tile)
            tiles.push_back({request, row, std::min(rows_per_tile, end - row)});
    }
    for (int row = 0; row < batch.num_rows; row++) context += double(batch.positions_T[row] + 1);
    const int num_tasks = int(tiles.size()) * layer.num_kv_heads;
    const double values = context * layer.num_heads * model.head_dim;
    pool.run_items(num_tasks, values / num_tasks / kValuesPerNanosecond, [&](int task) {
        // The last rows of a prompt, which see most, come first.
        const int from_last = num_tasks - 1 - task, kv_head = from_last % layer.num_kv_heads;
        const Tile& tile = tiles[from_last / layer.num_kv_heads];
        if (model.is_bf16)
            attend_tile(model, layer, batch, tile.request, tile.row, tile.num_rows, kv_head,
                        static_cast<const uint16_t*>(queries_TND), static_cast<uint16_t*>(output_TND));
        else
            attend_tile(model, layer, batch, tile.request, tile.row, tile.num_rows, kv_head,
                        static_cast<const float*>(queries_TND), static_cast<float*>(output_TND));
    });
}

}  // namespace lathe
