// Paged attention for few rows (PagedAttention, arXiv:2309.06180; online softmax, Milakov and Gimelshein 2018,
// arXiv:1805.02867), with the context cut into parts of `kPartTokens` that threads share (Flash-Decoding).
//
// The cut depends on positions only and parts are merged in order, so a row's result does not depend on the batch.
#include "attention.h"

#include <algorithm>
#include <cassert>
#include <cmath>
#include <numeric>

#include "amx.h"

namespace lathe {
namespace {

constexpr int kMaxVectors = 16;  // head_dim / 16
constexpr double kValuesPerNanosecond = 8;  // of keys and as many of values, that a thread attends to

float to_float(float value) {
    return value;
}

float to_float(uint16_t bf16) {
    return from_bf16(bf16);
}

int num_parts(int64_t position) {
    return int(position / kPartTokens) + 1;
}

// kVectors: head_dim / 16 where it is known at compile time, so that accumulators stay in registers; else 0.
template <class Cache, int kVectors>
void attend_row(const LatheModel& model, const LatheLayer& layer, const LatheBatch& batch,
                const AttentionPiece& piece, int kv_head, const float* queries, float* partial) {
    const int head_dim = model.head_dim;
    const int vectors = kVectors ? kVectors : head_dim / kLanes;
    const int tail = kVectors ? 0 : head_dim % kLanes;
    const int group = layer.num_heads / layer.num_kv_heads;
    const float scale = 1 / std::sqrt(float(head_dim));
    const int position = int(batch.positions_T[piece.row]);
    const int first_visible = layer.window ? std::max(0, position - layer.window + 1) : 0;
    const int begin = std::max(piece.part * kPartTokens, first_visible);
    const int end = std::min((piece.part + 1) * kPartTokens, position + 1);
    const int32_t* table = batch.block_tables_SB + size_t(piece.request) * batch.max_blocks;
    const size_t token_stride = size_t(layer.num_kv_heads) * head_dim;
    const auto* keys = static_cast<const Cache*>(layer.key_cache) + size_t(kv_head) * head_dim;
    const auto* values = static_cast<const Cache*>(layer.value_cache) + size_t(kv_head) * head_dim;
    for (int head = 0; head < group; head++) {
        partial[head * (head_dim + 2)] = kMasked;
        std::fill_n(partial + head * (head_dim + 2) + 1, head_dim + 1, 0.0f);
    }
    for (int block = begin / kBlock; block * kBlock < end; block++) {
        const int low = std::max(begin - block * kBlock, 0);
        const int high = std::min(end - block * kBlock, kBlock);
        const size_t start = size_t(table[block]) * kBlock * token_stride;
        if ((block + 1) * kBlock < end) {  // blocks lie anywhere: no hardware foresees the next
            const size_t next = size_t(table[block + 1]) * kBlock * token_stride;
            for (int token = 0; token < kBlock; token++)
                for (int i = 0; i < head_dim; i += 64 / int(sizeof(Cache))) {
                    __builtin_prefetch(keys + next + token * token_stride + i);
                    __builtin_prefetch(values + next + token * token_stride + i);
                }
        }
        for (int head = 0; head < group; head++) {
            float* mine = partial + head * (head_dim + 2);
            const float* query = queries + size_t(head) * head_dim;
            f32x16 dots[kBlock] = {};
            for (int token = low; token < high; token++) {
                const Cache* key = keys + start + token * token_stride;
                f32x16 dot{};
                for (int v = 0; v < vectors; v++)
                    dot = fma(load_lanes(query + v * kLanes), load_lanes(key + v * kLanes), dot);
                if (tail)
                    dot = fma(load_lanes(query + vectors * kLanes, tail),
                              load_lanes(key + vectors * kLanes, tail), dot);
                dots[token] = dot;
            }
            f32x16 scores = sum_each(dots) * scale;
            for (int token = 0; token < low; token++) scores[token] = kMasked;
            for (int token = high; token < kBlock; token++) scores[token] = kMasked;
            const float before = mine[0], peak = std::max(before, largest(scores));
            f32x16 weights = exponential(scores - peak);
            const float keep = std::exp(before - peak);
            mine[0] = peak;
            mine[1] = mine[1] * keep + sum(weights);
            f32x16 totals[kVectors ? kVectors : kMaxVectors];
            for (int v = 0; v < vectors; v++) totals[v] = load_lanes(mine + 2 + v * kLanes) * keep;
            for (int i = 0; i < tail; i++) mine[2 + vectors * kLanes + i] *= keep;
            for (int token = low; token < high; token++) {
                const Cache* value = values + start + token * token_stride;
                const f32x16 weight = splat(weights[token]);
                for (int v = 0; v < vectors; v++)
                    totals[v] = fma(weight, load_lanes(value + v * kLanes), totals[v]);
                for (int i = head_dim - tail; i < head_dim; i++)
                    mine[2 + i] = std::fma(weights[token], to_float(value[i]), mine[2 + i]);
            }
            for (int v = 0; v < vectors; v++) store_lanes(mine + 2 + v * kLanes, totals[v]);
        }
    }
}

template <class Cache>
void attend_row_of(const LatheModel& model, const LatheLayer& layer, const LatheBatch& batch,
                   const AttentionPiece& piece, int kv_head, const float* queries, float* partial) {
    switch (model.head_dim) {
        case 32: return attend_row<Cache, 2>(model, layer, batch, piece, kv_head, queries, partial);
        case 64: return attend_row<Cache, 4>(model, layer, batch, piece, kv_head, queries, partial);
        case 80: return attend_row<Cache, 5>(model, layer, batch, piece, kv_head, queries, partial);
        case 128: return attend_row<Cache, 8>(model, layer, batch, piece, kv_head, queries, partial);
        default: return attend_row<Cache, 0>(model, layer, batch, piece, kv_head, queries, partial);
    }
}

int group_of(const LatheLayer& layer) {
    return layer.num_heads / layer.num_kv_heads;
}

}  // namespace

void attend_with_vectors(const LatheModel& model, const LatheLayer& layer, const LatheBatch& batch,
                         const AttentionPiece& piece, int kv_head, const float* qkv_TA, int qkv_stride,
                         float* partial) {
    assert(piece.num_rows == 1);
    const float* queries =
        qkv_TA + size_t(piece.row) * qkv_stride + size_t(kv_head) * group_of(layer) * model.head_dim;
    model.is_bf16 ? attend_row_of<uint16_t>(model, layer, batch, piece, kv_head, queries, partial)
                  : attend_row_of<float>(model, layer, batch, piece, kv_head, queries, partial);
}

void Attention::plan(const LatheModel& model, const LatheBatch& batch) {
    int most_heads = 0, largest_group = 0;
    for (int l = 0; l < model.num_layers; l++) {
        most_heads = std::max(most_heads, model.layers[l].num_heads);
        largest_group = std::max(largest_group, group_of(model.layers[l]));
    }
    uses_amx_ = has_amx() && model.is_bf16 && model.head_dim % 32 == 0 && largest_group <= kLanes;
    const int rows_per_piece = uses_amx_ ? kLanes / largest_group : 1;
    pieces_.clear();
    first_slot_.clear();
    slot_step_.clear();
    int slot = 0;
    for (int request = 0; request < batch.num_requests; request++) {
        const int end = batch.query_start_S1[request + 1];
        for (int row = batch.query_start_S1[request]; row < end; row += rows_per_piece) {
            const int num_rows = std::min(rows_per_piece, end - row);
            for (int r = 0; r < num_rows; r++) {
                first_slot_.push_back(slot + r);
                slot_step_.push_back(num_rows);
            }
            const int parts = num_parts(batch.positions_T[row + num_rows - 1]);
            for (int part = 0; part < parts; part++, slot += num_rows)
                pieces_.push_back({row, num_rows, request, part, slot});
        }
    }
    grown(partial_, size_t(slot) * most_heads * (model.head_dim + 2));
}

void Attention::run(Pool& pool, const LatheModel& model, const LatheLayer& layer,
                    const LatheBatch& batch, const float* qkv_TA, int qkv_stride) {
    const int num_tasks = int(pieces_.size()) * layer.num_kv_heads;
    const double context = std::accumulate(
        batch.positions_T, batch.positions_T + batch.num_rows, double(batch.num_rows));
    const double values = context * layer.num_heads * model.head_dim;
    pool.run_items(num_tasks, values / num_tasks / kValuesPerNanosecond, [&](int task) {
        const AttentionPiece& piece = pieces_[task / layer.num_kv_heads];
        const int kv_head = task % layer.num_kv_heads;
        const size_t first_head = size_t(piece.slot) * layer.num_heads + kv_head * group_of(layer);
        float* partial = partial_.data() + first_head * (model.head_dim + 2);
        (uses_amx_ ? attend_with_amx : attend_with_vectors)(model, layer, batch, piece, kv_head, qkv_TA,
                                                            qkv_stride, partial);
    });
}

void Attention::gather_row(const LatheModel& model, const LatheLayer& layer, const LatheBatch& batch,
                           int row, float* output_ND) const {
    const int head_dim = model.head_dim, parts = num_parts(batch.positions_T[row]);
    const size_t slot_size = size_t(layer.num_heads) * (head_dim + 2);
    const size_t part_stride = slot_step_[row] * slot_size;
    for (int head = 0; head < layer.num_heads; head++) {
        const float* partial =
            partial_.data() + first_slot_[row] * slot_size + size_t(head) * (head_dim + 2);
        float* output = output_ND + size_t(head) * head_dim;
        float peak = kMasked;
        for (int p = 0; p < parts; p++) peak = std::max(peak, partial[p * part_stride]);
        float total = 0;
        std::fill_n(output, head_dim, 0.0f);
        for (int p = 0; p < parts; p++) {
            const float* part = partial + p * part_stride;
            const float keep = std::exp(part[0] - peak);
            total += part[1] * keep;
            for (int i = 0; i < head_dim; i++) output[i] += keep * part[2 + i];
        }
        for (int i = 0; i < head_dim; i++) output[i] /= total;
    }
}

}  // namespace lathe
