// 64-byte vectors of the accumulation type, in the portable vector extension, and their loads and stores.
#pragma once

#include "isa.h"

namespace vcl::VCL_ISA {

// Always inlined: a call would spill every live vector.
#define VCL_IN_LOOP [[gnu::always_inline]] inline

template <class A, int bytes> struct VectorOf { typedef A type __attribute__((vector_size(bytes))); };
template <class A> using Vec = typename VectorOf<A, 64>::type;
template <class A> using Half = typename VectorOf<A, 32>::type;
template <class H> struct Halves { H low, high; };
template <class A> constexpr int64_t lanes = 64 / sizeof(A);

using u16x16 = Half<uint16_t>;
using u32x16 = Vec<uint32_t>;

template <class A> inline Vec<A> broadcast(A a) { return Vec<A>{} + a; }

// The values of vectors, one after another.
template <class A> inline A* values(Vec<A>* v) { return reinterpret_cast<A*>(v); }
template <class A> inline const A* values(const Vec<A>* v) { return reinterpret_cast<const A*>(v); }

// Calls f with the flag as a constant.
template <class F> VCL_IN_LOOP void with_flag(bool flag, F&& f) {
  if (flag) f(std::true_type());
  else f(std::false_type());
}

// f of the constants 0 … count - 1: arrays that are indexed so stay in registers.
template <int i> using Index = std::integral_constant<int, i>;
template <int count, class F> VCL_IN_LOOP void unrolled(F&& f) {
  [&]<int... i> [[gnu::always_inline]] (std::integer_sequence<int, i...>) {
    (f(Index<i>()), ...);
  }(std::make_integer_sequence<int, count>());
}

// ---- storage of 16 bits: widened exactly, rounded to nearest even; NaN stays NaN

#if VCL_LEVEL >= 2
inline Vec<float> from_bf16(u16x16 v) {  // GCC 12 widens by halves
  return std::bit_cast<Vec<float>>(_mm512_slli_epi32(_mm512_cvtepu16_epi32(std::bit_cast<__m256i>(v)), 16));
}
inline u16x16 to_bf16(Vec<float> v) {  // the portable steps with masks, in half the instructions
  const __m512i b = std::bit_cast<__m512i>(v), raised = _mm512_add_epi32(b, _mm512_set1_epi32(0x7fff));
  const __mmask16 odd = _mm512_test_epi32_mask(b, _mm512_set1_epi32(0x10000));
  const __m512i rounded = _mm512_srli_epi32(_mm512_mask_sub_epi32(raised, odd, raised, _mm512_set1_epi32(-1)), 16);
  const __mmask16 nan = _mm512_cmp_ps_mask(std::bit_cast<__m512>(v), std::bit_cast<__m512>(v), _CMP_UNORD_Q);
  return std::bit_cast<u16x16>(_mm512_cvtepi32_epi16(_mm512_mask_mov_epi32(rounded, nan, _mm512_set1_epi32(0x7fc0))));
}
inline Vec<float> from_f16(u16x16 v) { return std::bit_cast<Vec<float>>(_mm512_cvtph_ps(std::bit_cast<__m256i>(v))); }
inline u16x16 to_f16(Vec<float> v) {
  return std::bit_cast<u16x16>(_mm512_cvtps_ph(std::bit_cast<__m512>(v), _MM_FROUND_TO_NEAREST_INT));
}
#else
inline Vec<float> from_bf16(u16x16 v) { return std::bit_cast<Vec<float>>(__builtin_convertvector(v, u32x16) << 16); }
inline u16x16 to_bf16(Vec<float> v) {
  const u32x16 b = std::bit_cast<u32x16>(v), ordered = std::bit_cast<u32x16>(v == v);
  const u32x16 rounded = (b + 0x7fff + ((b >> 16) & 1)) >> 16;
  return __builtin_convertvector((rounded & ordered) | (0x7fc0 & ~ordered), u16x16);
}
#endif
#if VCL_LEVEL == 1
inline Vec<float> from_f16(u16x16 v) {
  const auto [low, high] = std::bit_cast<Halves<__m128i>>(v);
  return std::bit_cast<Vec<float>>(Halves<__m256>{_mm256_cvtph_ps(low), _mm256_cvtph_ps(high)});
}
inline u16x16 to_f16(Vec<float> v) {
  const auto [low, high] = std::bit_cast<Halves<__m256>>(v);
  return std::bit_cast<u16x16>(Halves<__m128i>{_mm256_cvtps_ph(low, _MM_FROUND_TO_NEAREST_INT),
                                               _mm256_cvtps_ph(high, _MM_FROUND_TO_NEAREST_INT)});
}
#elif VCL_LEVEL == 0
[[gnu::noinline]] inline Vec<float> from_f16(u16x16 v) {
  const u32x16 bits = __builtin_convertvector(v, u32x16), sign = (bits & 0x8000) << 16, magnitude = bits & 0x7fff;
  const u32x16 normal = (magnitude << 13) + (112u << 23), special = (magnitude << 13) + (224u << 23);
  const Vec<float> subnormal = __builtin_convertvector(magnitude, Vec<float>) * 0x1p-24f;
  const u32x16 finite = magnitude < 0x0400 ? std::bit_cast<u32x16>(subnormal) : normal;
  return std::bit_cast<Vec<float>>(sign | (magnitude < 0x7c00 ? finite : special));
}
[[gnu::noinline]] inline u16x16 to_f16(Vec<float> v) {
  const u32x16 bits = std::bit_cast<u32x16>(v), sign = (bits >> 16) & 0x8000, magnitude = bits & 0x7fffffff;
  const u32x16 normal = (magnitude + 0xfff + ((magnitude >> 13) & 1) - (112u << 23)) >> 13;
  const u32x16 subnormal = std::bit_cast<u32x16>(std::bit_cast<Vec<float>>(magnitude) + 0.5f) - 0x3f000000;  // rounds
  const u32x16 finite = magnitude < 0x38800000 ? subnormal : normal;
  const u32x16 special = 0x7c00 + (magnitude > 0x7f800000 ? broadcast<uint32_t>(0x200) : u32x16{});
  return __builtin_convertvector(sign | (magnitude < 0x47800000 ? finite : special), u16x16);
}
#endif

// A vector as it is stored.
template <class T> using Packed = std::conditional_t<sizeof(T) == 2, u16x16, Vec<acc_t<T>>>;

template <class T> inline Vec<acc_t<T>> unpack(Packed<T> v) {
  if constexpr (std::is_same_v<T, bf16>) return from_bf16(v);
  else if constexpr (std::is_same_v<T, f16>) return from_f16(v);
  else return v;
}

template <class T> inline Packed<T> pack(Vec<acc_t<T>> v) {
  if constexpr (std::is_same_v<T, bf16>) return to_bf16(v);
  else if constexpr (std::is_same_v<T, f16>) return to_f16(v);
  else return v;
}

// ---- a whole vector, from and to any address

template <class T> inline Vec<acc_t<T>> load(const T* p) {
  Packed<T> v;
  std::memcpy(&v, p, sizeof v);
  return unpack<T>(v);
}

// `stream` bypasses the caches; it wants an address aligned to the vector's stored size.
template <bool stream, class T> inline void store(T* p, Vec<acc_t<T>> wide) {
  const Packed<T> v = pack<T>(wide);
#if VCL_LEVEL >= 2
  if constexpr (stream && sizeof v == 64) {
    return _mm512_stream_si512(reinterpret_cast<__m512i*>(p), std::bit_cast<__m512i>(v));
  }
#endif
#if VCL_LEVEL >= 1
  if constexpr (stream) {
    __m256i stored[sizeof v / 32];
    std::memcpy(stored, &v, sizeof v);
    for (size_t i = 0; i < sizeof v / 32; ++i) _mm256_stream_si256(reinterpret_cast<__m256i*>(p) + i, stored[i]);
    return;
  }
#endif
  std::memcpy(p, &v, sizeof v);
}

inline void stream_fence() {
#if VCL_LEVEL >= 1
  _mm_sfence();
#endif
}

// ---- the first `count` < lanes values; the rest of the vector is zero

template <class T> inline Vec<acc_t<T>> load_some(const T* p, int64_t count) {
#if VCL_LEVEL >= 2
  const uint32_t mask = (1u << count) - 1;
  if constexpr (sizeof(T) == 2) return unpack<T>(std::bit_cast<u16x16>(_mm256_maskz_loadu_epi16(mask, p)));
  if constexpr (sizeof(T) == 4) return std::bit_cast<Vec<float>>(_mm512_maskz_loadu_ps(mask, p));
  if constexpr (sizeof(T) == 8) return std::bit_cast<Vec<double>>(_mm512_maskz_loadu_pd(mask, p));
#else
  Packed<T> v = {};
  for (int64_t i = 0; i < count; ++i) std::memcpy(reinterpret_cast<T*>(&v) + i, p + i, sizeof(T));
  return unpack<T>(v);
#endif
}

template <class T> inline void store_some(T* p, Vec<acc_t<T>> wide, int64_t count) {
  const Packed<T> v = pack<T>(wide);
#if VCL_LEVEL >= 2
  const uint32_t mask = (1u << count) - 1;
  if constexpr (sizeof(T) == 2) _mm256_mask_storeu_epi16(p, mask, std::bit_cast<__m256i>(v));
  if constexpr (sizeof(T) == 4) _mm512_mask_storeu_ps(p, mask, std::bit_cast<__m512>(v));
  if constexpr (sizeof(T) == 8) _mm512_mask_storeu_pd(p, mask, std::bit_cast<__m512d>(v));
#else
  for (int64_t i = 0; i < count; ++i) std::memcpy(p + i, reinterpret_cast<const T*>(&v) + i, sizeof(T));
#endif
}

// A whole vector, or the first `count` where fewer are left.
template <class T> VCL_IN_LOOP Vec<acc_t<T>> load_up_to(const T* p, int64_t count) {
  return count >= lanes<acc_t<T>> ? load(p) : load_some(p, count);
}

template <bool stream, class T> VCL_IN_LOOP void store_up_to(T* p, Vec<acc_t<T>> v, int64_t count) {
  if (count >= lanes<acc_t<T>>) store<stream>(p, v);
  else store_some(p, v, count);
}

template <class A> inline A sum_lanes(Vec<A> v) {  // pairwise, always in the same order
  const auto [h0, h1] = std::bit_cast<Halves<Half<A>>>(v);
  const auto [q0, q1] = std::bit_cast<Halves<typename VectorOf<A, 16>::type>>(h0 + h1);
  const auto q = q0 + q1;
  if constexpr (sizeof(A) == 8) return q[0] + q[1];
  else return (q[0] + q[2]) + (q[1] + q[3]);
}

template <class A> inline Vec<A> lane_index() {
  Vec<A> v;
  for (int64_t i = 0; i < lanes<A>; ++i) v[i] = A(i);
  return v;
}

// ---- a vector as one or two of float64: statistics are merged in float64, whatever the accumulation type

template <class A> constexpr int wide_vectors = sizeof(double) / sizeof(A);
template <class A> using Wide = Vec<double>[wide_vectors<A>];

template <class A> inline Vec<double> to_wide(Vec<A> v, int h) {
  if constexpr (sizeof(A) == 8) {
    return v;
  } else {
#if VCL_LEVEL >= 2  // GCC 12 goes by way of memory
    const __m512 all = std::bit_cast<__m512>(v);
    return std::bit_cast<Vec<double>>(
        _mm512_cvtps_pd(h ? _mm512_extractf32x8_ps(all, 1) : _mm512_castps512_ps256(all)));
#else
    const auto [low, high] = std::bit_cast<Halves<Half<A>>>(v);
    return __builtin_convertvector(h ? high : low, Vec<double>);
#endif
  }
}

template <class A> inline Vec<A> from_wide(const Vec<double>* wide) {
  if constexpr (sizeof(A) == 8) {
    return *wide;
  } else {
#if VCL_LEVEL >= 2  // by way of memory, a load would wait for two narrower stores
    const __m256 low = _mm512_cvtpd_ps(std::bit_cast<__m512d>(wide[0]));
    const __m256 high = _mm512_cvtpd_ps(std::bit_cast<__m512d>(wide[1]));
    return std::bit_cast<Vec<A>>(_mm512_insertf32x8(_mm512_castps256_ps512(low), high, 1));
#else
    const auto half = [&](int h) { return __builtin_convertvector(wide[h], Half<A>); };
    return std::bit_cast<Vec<A>>(Halves<Half<A>>{half(0), half(1)});
#endif
  }
}

}  // namespace vcl::VCL_ISA
