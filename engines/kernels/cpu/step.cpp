// A whole step in one call: every layer's phases in order, and the C interface.
//
// Between products a row's state is float32; a step of T rows leaves Python once instead of some 400 times. Work on
// single rows (norms, rotation, quantization) is too small to share among threads at one row and is run by rows.
#include <algorithm>
#include <cmath>
#include <mutex>

#include "amx.h"
#include "attention.h"
#include "lathe.h"
#include "pool.h"
#include "product.h"
#include "rows.h"
#include "simd.h"

using namespace lathe;

struct LatheContext {
    explicit LatheContext(int num_threads) : pool(num_threads) {}

    std::mutex mutex;
    Pool pool;
    Attention attention;
    LinearScratch scratch;
    Buffer<float> hidden, wide, narrow, output;
    std::vector<int32_t> remaining;  // feed-forwards that each row still skips
    std::vector<int> run, skipped;   // rows of one layer
};

namespace {

void to_floats(const void* from, bool is_bf16, size_t size, float* to) {
    if (!is_bf16) {
        std::memcpy(to, from, size * sizeof(float));
        return;
    }
    const auto* values = static_cast<const uint16_t*>(from);
    size_t i = 0;
    for (; i + kLanes <= size; i += kLanes) store_lanes(to + i, load_lanes(values + i));
    for (; i < size; i++) to[i] = from_bf16(values[i]);
}

void from_floats(const float* from, bool is_bf16, size_t size, void* to) {
    if (!is_bf16) {
        std::memcpy(to, from, size * sizeof(float));
        return;
    }
    auto* values = static_cast<uint16_t*>(to);
    size_t i = 0;
    for (; i + kLanes <= size; i += kLanes) store_lanes(values + i, load_lanes(from + i));
    for (; i < size; i++) values[i] = to_bf16(from[i]);
}

void rotate_and_write_row(const LatheModel& model, const LatheLayer& layer, const LatheBatch& batch,
                          int row, float* qkv) {
    const int head_dim = model.head_dim, half = head_dim / 2;
    const size_t position = size_t(batch.positions_T[row]);
    for (int head = 0; head < layer.num_heads + layer.num_kv_heads; head++) {
        float* values = qkv + size_t(head) * head_dim;
        const float* norm = head < layer.num_heads ? layer.query_norm_D : layer.key_norm_D;
        if (norm) rms_norm_row(values, norm, head_dim, model.rms_norm_epsilon, values);
        rotate_head(values, model.cos_PR + position * half, model.sin_PR + position * half, head_dim);
    }
    const size_t size = size_t(layer.num_kv_heads) * head_dim;
    const size_t start = size_t(batch.slot_mapping_T[row]) * size * (model.is_bf16 ? 2 : 4);
    const float* keys = qkv + size_t(layer.num_heads) * head_dim;
    from_floats(keys, model.is_bf16, size, static_cast<char*>(layer.key_cache) + start);
    from_floats(keys + size, model.is_bf16, size, static_cast<char*>(layer.value_cache) + start);
}

// Normed rows of hidden_TH, ready to be multiplied by `linear`. rows: null for all of them, in order.
void prepare_normed(LatheContext& context, const LatheModel& model, const LatheLinear& linear,
                    const float* weight_H, const float* hidden_TH, const int* rows, int num_rows) {
    const size_t hidden_size = model.hidden_size;
    float* narrow = grown(context.narrow, num_rows * hidden_size);
    context.scratch.inputs.reset(linear, 0, num_rows);
    context.pool.run_items(num_rows, model.hidden_size, [&](int i) {
        float* normed = narrow + i * hidden_size;
        rms_norm_row(hidden_TH + (rows ? rows[i] : i) * hidden_size, weight_H, model.hidden_size,
                     model.rms_norm_epsilon, normed);
        context.scratch.inputs.prepare_row(i, normed);
    });
}

// The feed-forward of some rows, one after another into `output_TH`, or added to it.
void feed_forward(LatheContext& context, const LatheModel& model, const LatheLayer& layer,
                  const float* hidden_TH, const int* rows, int num_rows, float* output_TH, bool add) {
    const size_t ffn_size = layer.down.in_features;
    prepare_normed(context, model, layer.gate_up, layer.post_norm_H, hidden_TH, rows, num_rows);
    float* wide = grown(context.wide, num_rows * 2 * ffn_size);
    float* narrow = grown(context.narrow, num_rows * ffn_size);
    multiply(context.pool, layer.gate_up, context.scratch, wide, 2 * layer.down.in_features, false);
    context.scratch.inputs.reset(layer.down, 0, num_rows);
    context.pool.run_items(num_rows, 2 * layer.down.in_features, [&](int i) {
        float* active = narrow + i * ffn_size;
        swiglu_row(wide + i * 2 * ffn_size, layer.down.in_features, active);
        context.scratch.inputs.prepare_row(i, active);
    });
    multiply(context.pool, layer.down, context.scratch, output_TH, model.hidden_size, add);
}

// Adds the output to the hidden state; the cosine of the state before and after.
float add_and_compare(float* hidden, const float* output, int size) {
    f32x16 products{}, before{}, after{};
    float product = 0, square_before = 0, square_after = 0;
    int i = 0;
    for (; i + kLanes <= size; i += kLanes) {
        const f32x16 h = load_lanes(hidden + i), y = h + load_lanes(output + i);
        products = fma(h, y, products);
        before = fma(h, h, before);
        after = fma(y, y, after);
        store_lanes(hidden + i, y);
    }
    for (; i < size; i++) {
        const float h = hidden[i], y = h + output[i];
        product += h * y;
        square_before += h * h;
        square_after += y * y;
        hidden[i] = y;
    }
    const float squares = (sum(before) + square_before) * (sum(after) + square_after);
    return (sum(products) + product) / std::max(std::sqrt(squares), 1e-8f);
}

// A middle layer's feed-forward: run for the rows that do not skip it, and looked at whether they skip the next.
void feed_forward_or_skip(LatheContext& context, const LatheModel& model, const LatheLayer& layer,
                          const LatheSkip& skip, const LatheSkipLayer& instead, int num_rows,
                          float* hidden_TH) {
    const size_t hidden_size = model.hidden_size;
    context.run.clear();
    context.skipped.clear();
    for (int row = 0; row < num_rows; row++)
        (context.remaining[row] > 0 ? context.skipped : context.run).push_back(row);
    const int num_run = int(context.run.size()), num_skipped = int(context.skipped.size());
    float* output = grown(context.output, num_rows * hidden_size);
    if (num_run) {
        feed_forward(context, model, layer, hidden_TH, context.run.data(), num_run, output, false);
        context.pool.run_items(num_run, model.hidden_size, [&](int i) {
            const int row = context.run[i];
            const float similarity = add_and_compare(hidden_TH + row * hidden_size,
                                                     output + i * hidden_size, model.hidden_size);
            context.remaining[row] = similarity >= skip.tau_T[row] ? skip.k : 0;
        });
    }
    if (num_skipped && instead.linear.num_segments) {
        prepare_normed(context, model, instead.linear, layer.post_norm_H, hidden_TH,
                       context.skipped.data(), num_skipped);
        multiply(context.pool, instead.linear, context.scratch, output, model.hidden_size, false);
    }
    context.pool.run_items(num_skipped, model.hidden_size, [&](int i) {
        const int row = context.skipped[i];
        float* hidden = hidden_TH + row * hidden_size;
        const float* added = instead.linear.num_segments ? output + i * hidden_size : instead.mean_H;
        for (size_t j = 0; added && j < hidden_size; j++) hidden[j] += added[j];
        context.remaining[row]--;
        skip.num_skipped_T[row]++;
    });
}

void run_attention(LatheContext& context, const LatheModel& model, const LatheLayer& layer,
                   const LatheBatch& batch, float* hidden_TH) {
    Pool& pool = context.pool;
    LinearScratch& scratch = context.scratch;
    const int num_rows = batch.num_rows, hidden_size = model.hidden_size;
    const int qkv_size = layer.qkv.out_features, attended_size = layer.o.in_features;
    prepare_normed(context, model, layer.qkv, layer.input_norm_H, hidden_TH, nullptr, num_rows);
    float* wide = grown(context.wide, size_t(num_rows) * qkv_size);
    float* narrow = grown(context.narrow, size_t(num_rows) * attended_size);
    multiply(pool, layer.qkv, scratch, wide, qkv_size, false);
    pool.run_items(num_rows, qkv_size, [&](int row) {
        rotate_and_write_row(model, layer, batch, row, wide + size_t(row) * qkv_size);
    });
    context.attention.run(pool, model, layer, batch, wide, qkv_size);
    scratch.inputs.reset(layer.o, 0, num_rows);
    pool.run_items(num_rows, attended_size, [&](int row) {
        float* attended = narrow + size_t(row) * attended_size;
        context.attention.gather_row(model, layer, batch, row, attended);
        scratch.inputs.prepare_row(row, attended);
    });
    multiply(pool, layer.o, scratch, hidden_TH, hidden_size, true);
}

}  // namespace

extern "C" {

int32_t lathe_has_amx() {
    return has_amx();
}

LatheContext* lathe_context_create(int32_t num_threads) {
    return new LatheContext(num_threads);
}

void lathe_context_destroy(LatheContext* context) {
    delete context;
}

void lathe_step(LatheContext* context, const LatheModel* model, const LatheBatch* batch,
                const LatheSkip* skip, void* hidden_TH) {
    const std::lock_guard<std::mutex> lock(context->mutex);
    const size_t size = size_t(batch->num_rows) * model->hidden_size;
    float* hidden = grown(context->hidden, size);
    to_floats(hidden_TH, model->is_bf16, size, hidden);
    context->attention.plan(*model, *batch);
    context->remaining.assign(batch->num_rows, 0);
    for (int i = 0; i < model->num_layers; i++) {
        const LatheLayer& layer = model->layers[i];
        run_attention(*context, *model, layer, *batch, hidden);
        if (skip && skip->layers[i].is_middle)
            feed_forward_or_skip(*context, *model, layer, *skip, skip->layers[i], batch->num_rows, hidden);
        else
            feed_forward(*context, *model, layer, hidden, nullptr, batch->num_rows, hidden, true);
    }
    context->pool.run_items(batch->num_rows, model->hidden_size, [&](int row) {
        float* values = hidden + size_t(row) * model->hidden_size;
        rms_norm_row(values, model->final_norm_H, model->hidden_size, model->rms_norm_epsilon, values);
    });
    from_floats(hidden, model->is_bf16, size, hidden_TH);
}

void lathe_linear(LatheContext* context, const LatheLinear* linear, const void* x_TI, int32_t x_is_bf16,
                  int32_t num_rows, void* output_TO, int32_t output_is_bf16) {
    const std::lock_guard<std::mutex> lock(context->mutex);
    LinearScratch& scratch = context->scratch;
    const size_t in_size = linear->in_features, out_size = linear->out_features;
    float* x = grown(context->narrow, num_rows * in_size);
    scratch.inputs.reset(*linear, 0, num_rows);
    context->pool.run_items(num_rows, in_size, [&](int row) {
        const char* from = static_cast<const char*>(x_TI) + row * in_size * (x_is_bf16 ? 2 : 4);
        to_floats(from, x_is_bf16, in_size, x + row * in_size);
        scratch.inputs.prepare_row(row, x + row * in_size);
    });
    float* output = output_is_bf16 ? grown(context->wide, num_rows * out_size)
                                   : static_cast<float*>(output_TO);
    multiply(context->pool, *linear, scratch, output, linear->out_features, false);
    if (output_is_bf16) from_floats(output, true, num_rows * out_size, output_TO);
}

void lathe_dequantize(LatheContext* context, const LatheSegment* segment, uint16_t* weight_OI) {
    const std::lock_guard<std::mutex> lock(context->mutex);
    dequantize(context->pool, *segment, weight_OI);
}

void lathe_rms_norm(LatheContext* context, const float* x_TH, const float* weight_H, int32_t num_rows,
                    int32_t width, float epsilon, float* output_TH) {
    const std::lock_guard<std::mutex> lock(context->mutex);
    context->pool.run(num_rows, [&](int row) {
        rms_norm_row(x_TH + size_t(row) * width, weight_H, width, epsilon, output_TH + size_t(row) * width);
    });
}

void lathe_swiglu(LatheContext* context, const float* gate_up_TF, int32_t num_rows, int32_t width,
                  float* output_TF) {
    const std::lock_guard<std::mutex> lock(context->mutex);
    context->pool.run(num_rows, [&](int row) {
        swiglu_row(gate_up_TF + size_t(row) * 2 * width, width, output_TF + size_t(row) * width);
    });
}

void lathe_rotate_and_write(LatheContext* context, const LatheModel* model, int32_t layer,
                            const LatheBatch* batch, float* qkv_TA) {
    const std::lock_guard<std::mutex> lock(context->mutex);
    const LatheLayer& one = model->layers[layer];
    const size_t stride = size_t(one.num_heads + 2 * one.num_kv_heads) * model->head_dim;
    context->pool.run(batch->num_rows, [&](int row) {
        rotate_and_write_row(*model, one, *batch, row, qkv_TA + row * stride);
    });
}

void lathe_attention(LatheContext* context, const LatheModel* model, int32_t layer,
                     const LatheBatch* batch, const float* qkv_TA, float* output_TND) {
    const std::lock_guard<std::mutex> lock(context->mutex);
    const LatheLayer& one = model->layers[layer];
    const int stride = (one.num_heads + 2 * one.num_kv_heads) * model->head_dim;
    context->attention.plan(*model, *batch);
    context->attention.run(context->pool, *model, one, *batch, qkv_TA, stride);
    context->pool.run(batch->num_rows, [&](int row) {
        context->attention.gather_row(*model, one, *batch, row,
                                      output_TND + size_t(row) * one.num_heads * model->head_dim);
    });
}

void lathe_long_attention(LatheContext* context, const LatheModel* model, int32_t layer,
                          const LatheBatch* batch, const void* queries_TND, void* output_TND) {
    const std::lock_guard<std::mutex> lock(context->mutex);
    attend_long(context->pool, *model, model->layers[layer], *batch, queries_TND, output_TND);
}

}  // extern "C"
