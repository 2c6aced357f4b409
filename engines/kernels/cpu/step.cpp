// A whole step in one call: every layer's phases in order, and the C interface.
//
// Between products a row's state is float32; a step of T rows leaves Python once instead of some 400 times. Work on
// single rows (norms, rotation, quantization) is too small to share among threads at one row and is run by rows.
#include <algorithm>
#include <mutex>

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
    std::vector<float> hidden, normed, wide, narrow;
};

namespace {

float* grown(std::vector<float>& buffer, size_t size) {
    if (buffer.size() < size) buffer.resize(size);
    return buffer.data();
}

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

void run_layer(LatheContext& context, const LatheModel& model, const LatheLayer& layer,
               const LatheBatch& batch, float* hidden_TH) {
    Pool& pool = context.pool;
    LinearScratch& scratch = context.scratch;
    const int num_rows = batch.num_rows, hidden_size = model.hidden_size;
    const int qkv_size = layer.qkv.out_features, attended_size = layer.o.in_features;
    const int ffn_size = layer.down.in_features;
    const size_t widest = std::max({hidden_size, attended_size, ffn_size});
    float* wide = grown(context.wide, size_t(num_rows) * std::max(qkv_size, 2 * ffn_size));
    float* narrow = grown(context.narrow, size_t(num_rows) * widest);
    const auto norm_rows = [&](const float* weight_H) {
        pool.run_items(num_rows, hidden_size, [&](int row) {
            float* normed = narrow + row * widest;
            rms_norm_row(hidden_TH + size_t(row) * hidden_size, weight_H, hidden_size,
                         model.rms_norm_epsilon, normed);
            scratch.inputs.prepare_row(row, normed);
        });
    };

    scratch.inputs.reset(layer.qkv, 0, num_rows);
    norm_rows(layer.input_norm_H);
    multiply(pool, layer.qkv, scratch, wide, qkv_size, false);
    pool.run_items(num_rows, qkv_size, [&](int row) {
        rotate_and_write_row(model, layer, batch, row, wide + size_t(row) * qkv_size);
    });
    context.attention.run(pool, model, layer, batch, wide, qkv_size);
    scratch.inputs.reset(layer.o, 0, num_rows);
    pool.run_items(num_rows, attended_size, [&](int row) {
        float* attended = narrow + row * widest;
        context.attention.gather_row(model, layer, row, attended);
        scratch.inputs.prepare_row(row, attended);
    });
    multiply(pool, layer.o, scratch, hidden_TH, hidden_size, true);

    scratch.inputs.reset(layer.gate_up, 0, num_rows);
    norm_rows(layer.post_norm_H);
    multiply(pool, layer.gate_up, scratch, wide, 2 * ffn_size, false);
    scratch.inputs.reset(layer.down, 0, num_rows);
    pool.run_items(num_rows, 2 * ffn_size, [&](int row) {
        float* active = narrow + row * widest;
        swiglu_row(wide + size_t(row) * 2 * ffn_size, ffn_size, active);
        scratch.inputs.prepare_row(row, active);
    });
    multiply(pool, layer.down, scratch, hidden_TH, hidden_size, true);
}

}  // namespace

extern "C" {

LatheContext* lathe_context_create(int32_t num_threads) {
    return new LatheContext(num_threads);
}

void lathe_context_destroy(LatheContext* context) {
    delete context;
}

void lathe_step(LatheContext* context, const LatheModel* model, const LatheBatch* batch, void* hidden_TH) {
    const std::lock_guard<std::mutex> lock(context->mutex);
    const size_t size = size_t(batch->num_rows) * model->hidden_size;
    float* hidden = grown(context->hidden, size);
    to_floats(hidden_TH, model->is_bf16, size, hidden);
    context->attention.plan(*model, *batch);
    for (int layer = 0; layer < model->num_layers; layer++)
        run_layer(*context, *model, model->layers[layer], *batch, hidden);
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
        context->attention.gather_row(*model, one, row,
                                      output_TND + size_t(row) * one.num_heads * model->head_dim);
    });
}

}  // extern "C"
