// AMX, the x86 matrix units: tiles of 16 rows x 64 bytes times 64 bytes x 16 columns, summed in 32 bits.
//
// One instruction adds to C (16 x 16) the product of A (rows x inputs) and B (inputs x columns). B holds inputs in pairs of
// bfloat16 or fours of bytes: its line k has, for each of 16 columns, its k-th such word. An element's sum depends on
// its row of A and its column of B only.
#pragma once

#include "simd.h"

#if defined(__AMX_BF16__) && defined(__AMX_INT8__) && defined(__AVX512BF16__) && defined(__linux__)
#define LATHE_AMX 1
#endif

namespace lathe {

// Whether products and attention may use it: compiled, and allowed by Linux, which is asked once.
bool has_amx();

#if LATHE_AMX

constexpr int kDepth = 32;              // bfloat16 of a row of A
constexpr int kTile = kLanes * kDepth;  // and of a tile

// Tiles 0-3 hold C, 4 and 5 A, 6 and 7 B.
template <int kNumber>
LATHE_INLINE void tile_load(const void* from, size_t stride_bytes) {
    asm volatile("tileloadd (%0,%1,1), %%tmm%c2" ::"r"(from), "r"(stride_bytes), "i"(kNumber) : "memory");
}

template <int kNumber>
LATHE_INLINE void tile_store(void* to) {
    asm volatile("tilestored %%tmm%c2, (%0,%1,1)" ::"r"(to), "r"(size_t(64)), "i"(kNumber) : "memory");
}

template <int kNumber>
LATHE_INLINE void tile_zero() {
    asm volatile("tilezero %%tmm%c0" ::"i"(kNumber));
}

template <int kC, int kA, int kB>
LATHE_INLINE void multiply_bf16() {
    asm volatile("tdpbf16ps %%tmm%c2, %%tmm%c1, %%tmm%c0" ::"i"(kC), "i"(kA), "i"(kB));
}

template <int kC, int kA, int kB>
LATHE_INLINE void multiply_int8() {
    asm volatile("tdpbssd %%tmm%c2, %%tmm%c1, %%tmm%c0" ::"i"(kC), "i"(kA), "i"(kB));
}

// A thread's use of tiles. Tiles that hold nothing are not saved when the thread is switched, so they are released.
class Tiles {
   public:
    Tiles() = default;
    ~Tiles() {
        if (num_rows_) asm volatile("tilerelease");
    }
    Tiles(const Tiles&) = delete;
    Tiles& operator=(const Tiles&) = delete;

    // Needed before the first tile, and costly enough to be left out where nothing changes.
    // num_rows: of A and C. row_bytes: of A; B has as many lines as that is words.
    void configure(int num_rows, int row_bytes) {
        if (num_rows == num_rows_ && row_bytes == row_bytes_) return;
        num_rows_ = num_rows;
        row_bytes_ = row_bytes;
        struct alignas(64) {
            uint8_t palette = 1, start_row = 0, reserved[14] = {};
            uint16_t row_bytes[16] = {};
            uint8_t rows[16] = {};
        } config;
        for (int tile = 0; tile < 8; tile++) {
            const bool is_a = tile == 4 || tile == 5, is_b = tile >= 6;
            config.row_bytes[tile] = is_a ? row_bytes : 64;
            config.rows[tile] = is_b ? row_bytes / 4 : num_rows;
        }
        asm volatile("ldtilecfg %0" ::"m"(config));
    }

   private:
    int num_rows_ = 0, row_bytes_ = 0;
};

// Two vectors as one of bfloat16, to nearest even.
LATHE_INLINE u16x32 pack_bf16(f32x16 low, f32x16 high) {
    return (u16x32)_mm512_cvtne2ps_pbh((__m512)high, (__m512)low);
}

#else

class Tiles {};

#endif

}  // namespace lathe
