// Causal grouped-query attention of a step's rows over the paged cache.
#pragma once

#include <vector>

#include "buffer.h"
#include "lathe.h"
#include "pool.h"

namespace lathe {

constexpr int kPartTokens = 256;
constexpr int kBlock = 16;  // tokens of a cache block: one lane each
constexpr float kMasked = -1e30f;

// Rows [row, row + num_rows) of a request over one part of its context. What it finds stands in as many slots from `slot` on.
struct AttentionPiece {
    int row, num_rows, request, part, slot;
};

// Query heads of one key/value head, for a piece, to (rows, N, D + 2) at `partial`, which is the first of its heads.
void attend_with_vectors(const LatheModel& model, const LatheLayer& layer, const LatheBatch& batch,
                         const AttentionPiece& piece, int kv_head, const float* qkv_TA, int qkv_stride,
                         float* partial);
void attend_with_amx(const LatheModel& model, const LatheLayer& layer, const LatheBatch& batch,
                     const AttentionPiece& piece, int kv_head, const float* qkv_TA, int qkv_stride,
                     float* partial);

// Of all rows at once, for passes of many: queries and output (T, N, D) are bfloat16 or float32, as the cache is.
// D is a multiple of 16. The rows' keys and values are in the cache.
void attend_long(Pool& pool, const LatheModel& model, const LatheLayer& layer, const LatheBatch& batch,
                 const void* queries_TND, void* output_TND);

// Buffers and the cut of a step's attention into pieces; `plan` once a step, the rest once a layer.
class Attention {
   public:
    void plan(const LatheModel& model, const LatheBatch& batch);

    // Queries stand at the start of each row of qkv_TA, rotated; the rows' keys and values are in the cache.
    void run(Pool& pool, const LatheModel& model, const LatheLayer& layer, const LatheBatch& batch,
             const float* qkv_TA, int qkv_stride);

    // One row's output (N, D), from its pieces. Safe for different rows at once.
    void gather_row(const LatheModel& model, const LatheLayer& layer, const LatheBatch& batch, int row,
                    float* output_ND) const;

   private:
    bool uses_amx_ = false;
    std::vector<AttentionPiece> pieces_;
    std::vector<int> first_slot_, slot_step_;  // of each row: its first part's slot, and from part to part
    Buffer<float> partial_;  // per slot and head: maximum, sum, D accumulators
};

}  // namespace lathe
