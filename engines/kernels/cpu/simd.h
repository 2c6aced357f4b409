// Sixteen lanes: the vector types that every kernel is written in, and the dot product that has instructions.
//
// GCC's vector extensions lower these types to whatever the machine has (one AVX-512 register, two AVX2 registers, four
// SSE or NEON ones), so little besides `dot_u8s8` knows instruction sets. Contraction is off (native.py's flags):
// a fused multiply-add happens where `fma` says so and nowhere else, which is what keeps a row's result the same
// whether it is computed alone or among others.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>

#if defined(__AVX2__)
#include <immintrin.h>
#endif

namespace lathe {

constexpr int kLanes = 16;

typedef float f32x16 __attribute__((vector_size(64), aligned(64)));
typedef int32_t i32x16 __attribute__((vector_size(64), aligned(64)));
typedef uint32_t u32x16 __attribute__((vector_size(64), aligned(64)));
typedef uint16_t u16x32 __attribute__((vector_size(64), aligned(64)));
typedef uint8_t u8x64 __attribute__((vector_size(64), aligned(64)));
typedef uint16_t u16x16 __attribute__((vector_size(32), aligned(32)));
typedef int8_t i8x16 __attribute__((vector_size(16), aligned(16)));

#define LATHE_INLINE inline __attribute__((always_inline))

template <class V>
LATHE_INLINE V load(const void* from) {
    V vector;
    std::memcpy(&vector, from, sizeof vector);
    return vector;
}

template <class V>
LATHE_INLINE void store(void* to, V vector) {
    std::memcpy(to, &vector, sizeof vector);
}

LATHE_INLINE f32x16 splat(float value) {
    return f32x16{} + value;
}

LATHE_INLINE f32x16 fma(f32x16 a, f32x16 b, f32x16 c) {
#if defined(__AVX512F__)
    return (f32x16)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c);
#elif defined(__FMA__)
    __m256 x[2], y[2], z[2];
    std::memcpy(x, &a, 64);
    std::memcpy(y, &b, 64);
    std::memcpy(z, &c, 64);
    for (int i = 0; i < 2; i++) z[i] = _mm256_fmadd_ps(x[i], y[i], z[i]);
    std::memcpy(&c, z, 64);
    return c;
#else
    f32x16 sum;
    for (int i = 0; i < kLanes; i++) sum[i] = __builtin_fmaf(a[i], b[i], c[i]);
    return sum;
#endif
}

LATHE_INLINE f32x16 maximum(f32x16 a, f32x16 b) {
#if defined(__AVX512F__)
    return (f32x16)_mm512_max_ps((__m512)a, (__m512)b);
#else
    return a > b ? a : b;
#endif
}

LATHE_INLINE f32x16 absolute(f32x16 a) {
    return (f32x16)((u32x16)a & 0x7fffffffu);
}

LATHE_INLINE float sum(f32x16 a) {
#if defined(__AVX512F__)
    return _mm512_reduce_add_ps((__m512)a);
#else
    for (int width = 8; width; width /= 2)
        for (int i = 0; i < width; i++) a[i] += a[i + width];
    return a[0];
#endif
}

LATHE_INLINE float largest(f32x16 a) {
#if defined(__AVX512F__)
    return _mm512_reduce_max_ps((__m512)a);
#endif
    float value = a[0];
    for (int i = 1; i < kLanes; i++) value = a[i] > value ? a[i] : value;
    return value;
}

LATHE_INLINE int32_t sum(i32x16 a) {
    int32_t total = 0;
    for (int i = 0; i < kLanes; i++) total += a[i];
    return total;
}

// Nearest integer, ties to even, of |a| < 2^22.
LATHE_INLINE i32x16 round_to_int(f32x16 a) {
    constexpr float kMagic = 12582912.0f;  // 1.5 * 2^23: the sum's last mantissa bit is worth one
    return (i32x16)(a + kMagic) - 0x4b400000;
}

// Conversions between widths; GCC 12 makes six instructions of what AVX-512 has one for.
LATHE_INLINE u32x16 widen(u16x16 a) {
#if defined(__AVX512F__)
    return (u32x16)_mm512_cvtepu16_epi32((__m256i)a);
#else
    return __builtin_convertvector(a, u32x16);
#endif
}

LATHE_INLINE i32x16 widen(i8x16 a) {
#if defined(__AVX512F__)
    return (i32x16)_mm512_cvtepi8_epi32((__m128i)a);
#else
    return __builtin_convertvector(a, i32x16);
#endif
}

LATHE_INLINE u16x16 narrow(u32x16 a) {
#if defined(__AVX512F__)
    return (u16x16)_mm512_cvtepi32_epi16((__m512i)a);
#else
    return __builtin_convertvector(a, u16x16);
#endif
}

LATHE_INLINE i8x16 narrow(i32x16 a) {
#if defined(__AVX512F__)
    return (i8x16)_mm512_cvtepi32_epi8((__m512i)a);
#else
    return __builtin_convertvector(a, i8x16);
#endif
}

LATHE_INLINE f32x16 from_bf16(u16x16 a) {
    return (f32x16)(widen(a) << 16);
}

// Round to nearest even, as torch does; not for NaN.
LATHE_INLINE u16x16 to_bf16(f32x16 a) {
    u32x16 bits = (u32x16)a;
    bits = bits + 0x7fffu + ((bits >> 16) & 1u);
    return narrow(bits >> 16);
}

LATHE_INLINE float from_bf16(uint16_t a) {
    uint32_t bits = uint32_t(a) << 16;
    float value;
    std::memcpy(&value, &bits, sizeof value);
    return value;
}

LATHE_INLINE uint16_t to_bf16(float a) {
    uint32_t bits;
    std::memcpy(&bits, &a, sizeof bits);
    return uint16_t((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16);
}

LATHE_INLINE f32x16 load_lanes(const float* from) {
    return load<f32x16>(from);
}

LATHE_INLINE f32x16 load_lanes(const uint16_t* from) {
    return from_bf16(load<u16x16>(from));
}

// The first `count` < 16 lanes; the others are zero.
template <class Element>
LATHE_INLINE f32x16 load_lanes(const Element* from, int count) {
    Element values[kLanes] = {};
    std::memcpy(values, from, count * sizeof(Element));
    return load_lanes(values);
}

LATHE_INLINE void store_lanes(float* to, f32x16 a) {
    store(to, a);
}

LATHE_INLINE void store_lanes(uint16_t* to, f32x16 a) {
    store(to, to_bf16(a));
}

// e^a within 2 units in the last place for a <= 88; 0 below -87.
LATHE_INLINE f32x16 exponential(f32x16 a) {
    const i32x16 underflow = a < -87.0f;
    a = maximum(a, splat(-87.0f));
    const i32x16 power = round_to_int(a * 1.44269504f);
    const f32x16 whole = __builtin_convertvector(power, f32x16);
    f32x16 rest = fma(whole, splat(-0.693359375f), a);  // ln 2 in two parts (Cody and Waite)
    rest = fma(whole, splat(2.12194440e-4f), rest);
    f32x16 series = splat(1.0f / 5040);
    series = fma(series, rest, splat(1.0f / 720));
    series = fma(series, rest, splat(1.0f / 120));
    series = fma(series, rest, splat(1.0f / 24));
    series = fma(series, rest, splat(1.0f / 6));
    series = fma(series, rest, splat(0.5f));
    series = fma(series, rest, splat(1.0f));
    series = fma(series, rest, splat(1.0f));
    const f32x16 result = (f32x16)((i32x16)series + (power << 23));
    return underflow ? f32x16{} : result;
}

// Lanes 0, 2, .. of a and then of b; lanes 1, 3, .. of both.
LATHE_INLINE f32x16 even_lanes(f32x16 a, f32x16 b) {
    return __builtin_shufflevector(a, b, 0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30);
}

LATHE_INLINE f32x16 odd_lanes(f32x16 a, f32x16 b) {
    return __builtin_shufflevector(a, b, 1, 3, 5, 7, 9, 11, 13, 15, 17, 19, 21, 23, 25, 27, 29, 31);
}

// Rows i of the result are lanes i of sixteen vectors: four rounds of a perfect shuffle.
LATHE_INLINE void transpose(u32x16 (&rows)[kLanes]) {
    u32x16 shuffled[kLanes];
    for (int round = 0; round < 4; round++) {
        for (int i = 0; i < kLanes / 2; i++) {
            const u32x16 a = rows[i], b = rows[i + kLanes / 2];
            shuffled[2 * i] =
                __builtin_shufflevector(a, b, 0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23);
            shuffled[2 * i + 1] = __builtin_shufflevector(a, b, 8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13,
                                                          29, 14, 30, 15, 31);
        }
        std::copy(shuffled, shuffled + kLanes, rows);
    }
}

// Transpose each 4 x 4 block of lanes 4q .. 4q + 3 of four vectors.
LATHE_INLINE void transpose_fours(const u32x16 (&from)[4], u32x16 (&to)[4]) {
    u32x16 low[2], high[2];
    for (int i = 0; i < 2; i++) {
        low[i] = __builtin_shufflevector(from[2 * i], from[2 * i + 1], 0, 16, 1, 17, 4, 20, 5, 21, 8, 24,
                                         9, 25, 12, 28, 13, 29);
        high[i] = __builtin_shufflevector(from[2 * i], from[2 * i + 1], 2, 18, 3, 19, 6, 22, 7, 23, 10,
                                          26, 11, 27, 14, 30, 15, 31);
    }
    const u32x16* halves[2] = {low, high};
    for (int i = 0; i < 2; i++) {
        const u32x16 a = halves[i][0], b = halves[i][1];
        to[2 * i] = __builtin_shufflevector(a, b, 0, 1, 16, 17, 4, 5, 20, 21, 8, 9, 24, 25, 12, 13, 28, 29);
        to[2 * i + 1] =
            __builtin_shufflevector(a, b, 2, 3, 18, 19, 6, 7, 22, 23, 10, 11, 26, 27, 14, 15, 30, 31);
    }
}

// Lane i of the result is the sum of the lanes of rows[i]. Overwrites rows.
LATHE_INLINE f32x16 sum_each(f32x16 (&rows)[kLanes]) {
    for (int count = kLanes / 2; count; count /= 2)
        for (int i = 0; i < count; i++)
            rows[i] = even_lanes(rows[2 * i], rows[2 * i + 1]) + odd_lanes(rows[2 * i], rows[2 * i + 1]);
    return rows[0];
}

// total + the dot product of each lane's four unsigned bytes with the four signed bytes of `signed4`.
// Without VNNI pairs are summed in 16 bits, which holds only while `unsigned4` is at most 128.
LATHE_INLINE i32x16 dot_u8s8(i32x16 total, u8x64 unsigned4, int32_t signed4) {
#if defined(__AVX512VNNI__)
    return (i32x16)_mm512_dpbusd_epi32((__m512i)total, (__m512i)unsigned4, _mm512_set1_epi32(signed4));
#elif defined(__AVX2__)
    const __m256i broadcast = _mm256_set1_epi32(signed4);
    __m256i half[2], codes[2];
    std::memcpy(half, &total, 64);
    std::memcpy(codes, &unsigned4, 64);
    for (int i = 0; i < 2; i++) {
#if defined(__AVXVNNI__)
        half[i] = _mm256_dpbusd_avx_epi32(half[i], codes[i], broadcast);
#else
        const __m256i pairs = _mm256_maddubs_epi16(codes[i], broadcast);
        half[i] = _mm256_add_epi32(half[i], _mm256_madd_epi16(pairs, _mm256_set1_epi16(1)));
#endif
    }
    std::memcpy(&total, half, 64);
    return total;
#else
    int8_t factors[4];
    std::memcpy(factors, &signed4, 4);
    for (int lane = 0; lane < kLanes; lane++)
        for (int i = 0; i < 4; i++) total[lane] += int32_t(unsigned4[4 * lane + i]) * factors[i];
    return total;
#endif
}

// The same for bytes up to 255, which the 16-bit sums cannot hold at once: u = 2 (u >> 1) + (u & 1).
LATHE_INLINE i32x16 dot_wide_u8s8(i32x16 total, u8x64 unsigned4, int32_t signed4) {
#if defined(__AVX512VNNI__)
    return dot_u8s8(total, unsigned4, signed4);
#else
    const i32x16 halves = dot_u8s8(i32x16{}, unsigned4 >> 1, signed4);
    return dot_u8s8(total, unsigned4 & 1, signed4) + halves + halves;
#endif
}

}  // namespace lathe
