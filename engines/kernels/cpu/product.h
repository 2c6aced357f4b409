// The products of a step's rows with a linear layer's matrices.
#pragma once

#include <vector>

#include "buffer.h"
#include "lathe.h"
#include "pool.h"

namespace lathe {

// The order in which a kernel reads its rows.
enum class Layout {
    kFloats,    // float32, as they are
    kEvenOdd,   // float32; of every 32 the even ones, then the odd ones (vector_product.cpp)
    kCodes,     // INT8 with a scale to 32 (vector_product.cpp)
    kTiles,     // bfloat16, in blocks of 16 rows (amx_product.cpp)
};

// The rows of one stage of a `LatheLinear`, in every layout that its segments are multiplied in. Segments that want the
// same layout of the same features share it.
class Inputs {
   public:
    // Ready for the rows [0, num_rows) of a stage; `prepare_row` then fills each.
    void reset(const LatheLinear& linear, int stage, int num_rows);

    // Safe for different rows at once. x has the stage's features.
    void prepare_row(int row, const float* x);

    struct Form {
        Layout layout;
        int32_t in_offset, in_features;
        int32_t stride;  // elements from row to row; features padded to 32 with zeros
        Buffer<float> floats;
        Buffer<uint16_t> bf16;
        Buffer<int8_t> codes;
        Buffer<float> scale_TG;    // of the codes
        Buffer<int32_t> sum_TG;  // of a group's codes
    };
    const Form& form_of(const LatheSegment& segment) const;
    int num_rows() const { return num_rows_; }

   private:
    std::vector<Form> forms_;
    size_t num_forms_ = 0;
    int num_rows_ = 0;
};

// Buffers of a whole linear layer. `inputs` are prepared by the caller, row by row, as part of whatever made the rows.
struct LinearScratch {
    Inputs inputs;
    Inputs middle_inputs;
    Buffer<float> middle;
};

// The whole layer on all threads: write (or, with `add`, add) to `output` with `stride` floats from row to row.
void multiply(Pool& pool, const LatheLinear& linear, LinearScratch& scratch, float* output,
              int output_stride, bool add);

// The values of INT4 or INT8 weights, rounded to bfloat16, row-major (O, I).
void dequantize(Pool& pool, const LatheSegment& segment, uint16_t* weight_OI);

}  // namespace lathe
