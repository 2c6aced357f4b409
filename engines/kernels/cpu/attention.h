// Causal grouped-query attention of a step's rows over the paged cache.
#pragma once

#include <vector>

#include "lathe.h"
#include "pool.h"

namespace lathe {

// Buffers and the cut of a step's attention into pieces; `plan` once a step, the rest once a layer.
class Attention {
   public:
    void plan(const LatheModel& model, const LatheBatch& batch);

    // Queries stand at the start of each row of qkv_TA, rotated; the rows' keys and values are in the cache.
    void run(Pool& pool, const LatheModel& model, const LatheLayer& layer, const LatheBatch& batch,
             const float* qkv_TA, int qkv_stride);

    // One row's output (N, D), from its pieces. Safe for different rows at once.
    void gather_row(const LatheModel& model, const LatheLayer& layer, int row, float* output_ND) const;

   private:
    struct Piece {
        int row, request, part;
    };
    template <class Cache>
    void piece_of(const LatheModel& model, const LatheLayer& layer, const LatheBatch& batch,
                  const Piece& piece, int index, int kv_head, const float* queries);
    template <class Cache, int kVectors>
    void piece(const LatheModel& model, const LatheLayer& layer, const LatheBatch& batch,
               const Piece& piece, int index, int kv_head, const float* queries);

    std::vector<Piece> pieces_;
    std::vector<int> first_piece_;  // of each row, and the end
    std::vector<float> partial_;    // per piece and head: maximum, sum, D accumulators
};

}  // namespace lathe
