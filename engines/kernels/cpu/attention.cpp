// Paged attention for few rows (PagedAttention, arXiv:2309.06180; online softmax, Milakov and Gimelshein 2018,
// arXiv:1805.02867), with the context cut into parts of `kPartTokens` that threads share (Flash-Decoding).
//
// The cut depends on positions only and parts are merged in order, so a row's result does not depend on the batch.
#include "attention.h"

#include <algorithm>
#include <cmath>
#include <numeric>

#include "simd.h"

namespace lathe {
namespace {

constexpr int kPartTokens = 256;
constexpr int kBlock = 16;      // tokens of a cache block: one lane each
constexpr int kMaxVectors = 16;  // head_dim / 16
constexpr double kValuesPerNanosecond = 8;  // of keys and as many of values, that a thread attends to
constexpr float kMasked = -1e30f;

float to_float(float value) {
    return value;
}

float to_float(uint16_t bf16) {
    return from_bf16(bf16);
}

}  // namespace

void Attention::plan(const LatheModel& model, const LatheBatch& batch) {
    pieces_.clear();
    first_piece_.assign(1, 0);
    for (int request = 0; request < batch.num_requests; request++)
        for (int row = batch.query_start_S1[request]; row < batch.query_start_S1[request + 1]; row++) {
            const int parts = int(batch.positions_T[row] / kPartTokens) + 1;
            for (int part = 0; part < parts; part++) pieces_.push_back({row, request, part});
            first_piece_.push_back(int(pieces_.size()));
        }
    int most_heads = 0;
    for (int l = 0; l < model.num_layers; l++)
        most_heads = std::max(most_heads, model.layers[l].num_heads);
    const size_t wanted = pieces_.size() * most_heads * (model.head_dim + 2);
    if (partial_.size() < wanted) partial_.resize(wanted);
}

// kVectors: head_dim / 16 where it is known at compile time, so that accumulators stay in registers; else 0.
template <class Cache, int kVectors>
void Attention::piece(const LatheModel& model, const LatheLayer& layer, const LatheBatch& batch,
                      const Piece& piece, int index, int kv_head, const float* queries) {
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
    float* partial = partial_.data() + (size_t(index) * layer.num_heads + size_t(kv_head) * group) *
                                           (head_dim + 2);
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
void Attention::piece_of(const LatheModel& model, const LatheLayer& layer, const LatheBatch& batch,
                         const Piece& one, int index, int kv_head, const float* queries) {
    switch (model.head_dim) {
        case 32: return piece<Cache, 2>(model, layer, batch, one, index, kv_head, queries);
        case 64: return piece<Cache, 4>(model, layer, batch, one, index, kv_head, queries);
        case 80: return piece<Cache, 5>(model, layer, batch, one, index, kv_head, queries);
        case 128: return piece<Cache, 8>(model, layer, batch, one, index, kv_head, queries);
        default: return piece<Cache, 0>(model, layer, batch, one, index, kv_head, queries);
    }
}

void Attention::run(Pool& pool, const LatheModel& model, const LatheLayer& layer,
                    const LatheBatch& batch, const float* qkv_TA, int qkv_stride) {
    const int num_tasks = int(pieces_.size()) * layer.num_kv_heads;
    const int group = layer.num_heads / layer.num_kv_heads;
    const double context = std::accumulate(
        batch.positions_T, batch.positions_T + batch.num_rows, double(batch.num_rows));
    const double values = context * layer.num_heads * model.head_dim;
    pool.run_items(num_tasks, values / num_tasks / kValuesPerNanosecond, [&](int task) {
        const int index = task / layer.num_kv_heads, kv_head = task % layer.num_kv_heads;
        const Piece& one = pieces_[index];
        const float* queries =
            qkv_TA + size_t(one.row) * qkv_stride + size_t(kv_head) * group * model.head_dim;
        if (model.is_bf16)
            piece_of<uint16_t>(model, layer, batch, one, index, kv_head, queries);
        else
            piece_of<float>(model, layer, batch, one, index, kv_head, queries);
    });
}

void Attention::gather_row(const LatheModel& model, const LatheLayer& layer, int row,
                           float* output_ND) const {
    const int head_dim = model.head_dim;
    const size_t piece_stride = size_t(layer.num_heads) * (head_dim + 2);
    const int first = first_piece_[row], last = first_piece_[row + 1];
    for (int head = 0; head < layer.num_heads; head++) {
        const float* partial = partial_.data() + first * piece_stride + size_t(head) * (head_dim + 2);
        float* output = output_ND + size_t(head) * head_dim;
        float peak = kMasked;
        for (int p = 0; p < last - first; p++) peak = std::max(peak, partial[p * piece_stride]);
        float total = 0;
        std::fill_n(output, head_dim, 0.0f);
        for (int p = 0; p < last - first; p++) {
            const float* part = partial + p * piece_stride;
            const float keep = std::exp(part[0] - peak);
            total += part[1] * keep;
            for (int i = 0; i < head_dim; i++) output[i] += keep * part[2 + i];
        }
        for (int i = 0; i < head_dim; i++) output[i] /= total;
    }
}

}  // namespace lathe
