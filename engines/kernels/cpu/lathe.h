// The C interface of the native library; engines/kernels/native.py declares the same structures to ctypes.
//
// Shapes: T rows of a step, O outputs, I inputs, G groups of inputs.
#pragma once

#include <cstdint>

extern "C" {

// How a weight is stored.
enum LatheKind : int32_t {
    LATHE_FP32 = 0,  // row-major (O, I)
    LATHE_BF16 = 1,  // row-major (O, I)
    LATHE_INT4 = 2,  // vector_product.cpp's layout of 16 outputs x 8 inputs
    LATHE_INT8 = 3,  // vector_product.cpp's layout of 16 outputs x 4 inputs
    // (ceil(O / 16), ceil(I / 32) * 16, 16, 2): pairs of inputs of 16 outputs, zeros past I and O; needs AMX
    LATHE_BF16_TILES = 4,
};

// One matrix of a linear layer. Several may share an input (q, k, v), and a low-rank pair is two: weight_v into the
// middle (stage 0), weight_u out of it (stage 1). Offsets count features.
struct LatheSegment {
    const void* weight;
    const void* scale;           // (ceil(O / 16), G, 16), bfloat16 or float32; null unless INT4 or INT8
    const int8_t* zero_point;    // (ceil(O / 16), G, 16); null when symmetric
    const float* bias;           // (O,) or null; stage 0 into the middle has none
    int32_t kind;
    int32_t scale_is_fp32;
    int32_t out_features;
    int32_t in_features;
    int32_t group_size;          // a multiple of 32; INT4 and INT8 only
    int32_t stage;
    int32_t into_middle;         // 1: writes the middle, 0: writes the output
    int32_t in_offset;
    int32_t out_offset;
};

struct LatheLinear {
    const LatheSegment* segments;  // stage 0 first
    int32_t num_segments;
    int32_t in_features;
    int32_t middle_features;       // 0 where nothing is low rank
    int32_t out_features;
};

struct LatheLayer {
    const float* input_norm_H;
    const float* post_norm_H;
    const float* query_norm_D;  // both null, or both given (Qwen3)
    const float* key_norm_D;
    LatheLinear qkv;
    LatheLinear o;
    LatheLinear gate_up;
    LatheLinear down;
    void* key_cache;            // (num_blocks, block_size, K, D)
    void* value_cache;
    int32_t num_heads;
    int32_t num_kv_heads;
    int32_t window;             // 0: unlimited
};

struct LatheModel {
    const LatheLayer* layers;
    const float* final_norm_H;
    const float* cos_PR;        // (positions, D / 2)
    const float* sin_PR;
    int32_t num_layers;
    int32_t hidden_size;
    int32_t head_dim;           // even, at most 256
    int32_t block_size;         // 16
    int32_t is_bf16;            // caches and hidden states: bfloat16, or float32
    float rms_norm_epsilon;
};

// The rows of a step; see metadata.py.
struct LatheBatch {
    const int64_t* positions_T;
    const int64_t* slot_mapping_T;
    const int32_t* block_tables_SB;
    const int32_t* query_start_S1;
    int32_t num_rows;
    int32_t num_requests;
    int32_t max_blocks;
};

// What rows that skip a layer's feed-forward get instead: a product of their normed input, a constant, or nothing.
struct LatheSkipLayer {
    LatheLinear linear;         // num_segments 0: none
    const float* mean_H;        // null: none
    int32_t is_middle;          // 0: the feed-forward always runs
};

// Which rows may skip feed-forwards; engines/ffn_skip.py tells the rule.
struct LatheSkip {
    const LatheSkipLayer* layers;
    const float* tau_T;         // a row whose similarity reaches it skips the next k; above 1: never
    int32_t* num_skipped_T;     // counted up
    int32_t k;
};

typedef struct LatheContext LatheContext;

// Whether there is AMX, for `LATHE_BF16_TILES` and for many rows of quantized weights; asks Linux for the permission.
int32_t lathe_has_amx();

// The threads, and the buffers of what they compute. Calls on one context wait for each other.
LatheContext* lathe_context_create(int32_t num_threads);
void lathe_context_destroy(LatheContext* context);

// Every layer and the final norm; hidden_TH is replaced by its result. Where skip is null, nothing is skipped.
void lathe_step(LatheContext* context, const LatheModel* model, const LatheBatch* batch,
                const LatheSkip* skip, void* hidden_TH);

// output_TO = x_TI W^T + b, each bfloat16 or float32.
void lathe_linear(LatheContext* context, const LatheLinear* linear, const void* x_TI, int32_t x_is_bf16,
                  int32_t num_rows, void* output_TO, int32_t output_is_bf16);

// The values of an INT4 or INT8 segment's weights, row-major (O, I), bfloat16.
void lathe_dequantize(LatheContext* context, const LatheSegment* segment, uint16_t* weight_OI);

// The parts of a step, one by one, in float32.
void lathe_rms_norm(LatheContext* context, const float* x_TH, const float* weight_H, int32_t num_rows,
                    int32_t width, float epsilon, float* output_TH);
void lathe_swiglu(LatheContext* context, const float* gate_up_TF, int32_t num_rows, int32_t width,
                  float* output_TF);
// Norms (where the layer has them) and rotates qkv_TA in place and writes its keys and values to the layer's cache.
void lathe_rotate_and_write(LatheContext* context, const LatheModel* model, int32_t layer,
                            const LatheBatch* batch, float* qkv_TA);
// output_TND from the queries at the start of each row of qkv_TA and the layer's cache.
void lathe_attention(LatheContext* context, const LatheModel* model, int32_t layer,
                     const LatheBatch* batch, const float* qkv_TA, float* output_TND);

// The attention of a pass of many rows, beside torch's products: queries_TND and output_TND as the layer's cache.
// head_dim is a multiple of 16.
void lathe_long_attention(LatheContext* context, const LatheModel* model, int32_t layer,
                          const LatheBatch* batch, const void* queries_TND, void* output_TND);

}  // extern "C"
