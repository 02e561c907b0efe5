// 64-byte vectors of the accumulation type, in GCC/Clang's portable vector extension, and their loads and
// stores from each storage type. Included inside the namespace of one instruction set.
#pragma once

struct bf16 { uint16_t bits; };
struct f16 { uint16_t bits; };

template <class T> struct AccOf { using type = float; };
template <> struct AccOf<double> { using type = double; };
template <class T> using acc_t = typename AccOf<T>::type;

// In the loop, whatever the compiler's own measure: a call would write every vector that is in use to memory.
#define VCL_IN_LOOP [[gnu::always_inline]] inline

template <class A> struct VecOf;
template <> struct VecOf<float> { typedef float type __attribute__((vector_size(64))); };
template <> struct VecOf<double> { typedef double type __attribute__((vector_size(64))); };
template <class A> using Vec = typename VecOf<A>::type;
template <class A> constexpr int64_t lanes = 64 / sizeof(A);

typedef uint16_t u16x16 __attribute__((vector_size(32)));
typedef uint32_t u32x16 __attribute__((vector_size(64)));

// ---- one value

inline float widen(bf16 v) { return std::bit_cast<float>(uint32_t(v.bits) << 16); }

inline float widen(f16 v) {
  const uint32_t sign = uint32_t(v.bits & 0x8000) << 16, magnitude = v.bits & 0x7fff;
  if (magnitude < 0x0400) {  // zero or subnormal: magnitude * 2^-24
    return std::bit_cast<float>(std::bit_cast<uint32_t>(float(magnitude) * 0x1p-24f) | sign);
  }
  const uint32_t exponent = magnitude < 0x7c00 ? uint32_t(112) << 23 : uint32_t(224) << 23;
  return std::bit_cast<float>(sign | ((magnitude << 13) + exponent));
}

inline float widen(float v) { return v; }
inline double widen(double v) { return v; }

template <class T> T narrow(acc_t<T> v) { return v; }

template <> inline bf16 narrow<bf16>(float v) {  // round to nearest even; NaN stays NaN
  const uint32_t b = std::bit_cast<uint32_t>(v);
  return {v != v ? uint16_t(0x7fc0) : uint16_t((b + 0x7fff + ((b >> 16) & 1)) >> 16)};
}

template <> inline f16 narrow<f16>(float v) {  // round to nearest even; NaN stays NaN
  const uint32_t b = std::bit_cast<uint32_t>(v), sign = (b >> 16) & 0x8000, magnitude = b & 0x7fffffff;
  if (magnitude > 0x7f800000) return {uint16_t(sign | 0x7e00)};
  if (magnitude >= 0x477ff000) return {uint16_t(sign | 0x7c00)};
  if (magnitude < 0x38800000) {  // subnormal: adding 0.5 rounds at 2^-24
    const float shifted = std::bit_cast<float>(magnitude) + 0.5f;
    return {uint16_t(sign | (std::bit_cast<uint32_t>(shifted) - 0x3f000000))};
  }
  return {uint16_t(sign | ((magnitude + 0xfff + ((magnitude >> 13) & 1) - (uint32_t(112) << 23)) >> 13))};
}

// ---- a whole vector, from any address

template <class T> inline Vec<acc_t<T>> load(const T* p) {
  Vec<acc_t<T>> v;
  std::memcpy(&v, p, sizeof v);
  return v;
}

#if VCL_LEVEL >= 2
inline Vec<float> from_bf16(__m256i v) {  // GCC 12 widens by halves
  return std::bit_cast<Vec<float>>(_mm512_slli_epi32(_mm512_cvtepu16_epi32(v), 16));
}
inline Vec<float> from_f16(__m256i v) { return std::bit_cast<Vec<float>>(_mm512_cvtph_ps(v)); }
#endif

template <> inline Vec<float> load(const bf16* p) {
#if VCL_LEVEL >= 2
  return from_bf16(_mm256_loadu_si256((const __m256i*)p));
#else
  u16x16 h;
  std::memcpy(&h, p, sizeof h);
  const u32x16 w = __builtin_convertvector(h, u32x16) << 16;
  return std::bit_cast<Vec<float>>(w);
#endif
}

template <> inline Vec<float> load(const f16* p) {
  Vec<float> v;
#if VCL_LEVEL >= 2
  return from_f16(_mm256_loadu_si256((const __m256i*)p));
#elif VCL_LEVEL >= 1
  for (int i = 0; i < 2; ++i) {
    const __m256 half = _mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)(p + 8 * i)));
    std::memcpy((char*)&v + 32 * i, &half, 32);
  }
#else
  for (int i = 0; i < 16; ++i) v[i] = widen(p[i]);
#endif
  return v;
}

inline u16x16 to_bf16(Vec<float> v) {
#if VCL_LEVEL >= 2  // the same with masks, in half the instructions
  const __m512i b = std::bit_cast<__m512i>(v), raised = _mm512_add_epi32(b, _mm512_set1_epi32(0x7fff));
  const __mmask16 odd = _mm512_test_epi32_mask(b, _mm512_set1_epi32(0x10000));
  const __m512i rounded = _mm512_srli_epi32(_mm512_mask_sub_epi32(raised, odd, raised, _mm512_set1_epi32(-1)), 16);
  const __mmask16 nan = _mm512_cmp_ps_mask(std::bit_cast<__m512>(v), std::bit_cast<__m512>(v), _CMP_UNORD_Q);
  return std::bit_cast<u16x16>(_mm512_cvtepi32_epi16(_mm512_mask_mov_epi32(rounded, nan, _mm512_set1_epi32(0x7fc0))));
#else
  const u32x16 b = std::bit_cast<u32x16>(v);
  const u32x16 rounded = (b + 0x7fff + ((b >> 16) & 1)) >> 16;
  const u32x16 ordered = std::bit_cast<u32x16>(v == v);
  return __builtin_convertvector((rounded & ordered) | (0x7fc0 & ~ordered), u16x16);
#endif
}

inline u16x16 to_f16(Vec<float> v) {
  u16x16 h;
#if VCL_LEVEL >= 2
  const __m256i packed = _mm512_cvtps_ph(std::bit_cast<__m512>(v), _MM_FROUND_TO_NEAREST_INT);
  std::memcpy(&h, &packed, sizeof h);
#elif VCL_LEVEL >= 1
  for (int i = 0; i < 2; ++i) {
    __m256 half;
    std::memcpy(&half, (const char*)&v + 32 * i, 32);
    const __m128i packed = _mm256_cvtps_ph(half, _MM_FROUND_TO_NEAREST_INT);
    std::memcpy((char*)&h + 16 * i, &packed, 16);
  }
#else
  for (int i = 0; i < 16; ++i) h[i] = narrow<f16>(v[i]).bits;
#endif
  return h;
}

// `stream` bypasses the caches; it wants an address aligned to the vector's stored size.
template <bool stream, class Packed> inline void put(void* p, Packed v) {
#if VCL_LEVEL >= 2
  if constexpr (stream && sizeof v == 64) return _mm512_stream_si512((__m512i*)p, std::bit_cast<__m512i>(v));
#endif
#if VCL_LEVEL >= 1
  if constexpr (stream) {
    for (size_t i = 0; i < sizeof v / 32; ++i) {
      __m256i part;
      std::memcpy(&part, (const char*)&v + 32 * i, 32);
      _mm256_stream_si256((__m256i*)p + i, part);
    }
    return;
  }
#endif
  std::memcpy(p, &v, sizeof v);
}

template <bool stream, class T> inline void store(T* p, Vec<acc_t<T>> v) { put<stream>(p, v); }
template <bool stream> inline void store(bf16* p, Vec<float> v) { put<stream>(p, to_bf16(v)); }
template <bool stream> inline void store(f16* p, Vec<float> v) { put<stream>(p, to_f16(v)); }

inline void stream_fence() {
#if VCL_LEVEL >= 1
  _mm_sfence();
#endif
}

// ---- the first `count` < lanes values; the rest of the vector is zero

template <class T> inline Vec<acc_t<T>> load_some(const T* p, int64_t count) {
  Vec<acc_t<T>> v = {};
  for (int64_t i = 0; i < count; ++i) v[i] = widen(p[i]);
  return v;
}

#if VCL_LEVEL >= 2
template <> inline Vec<float> load_some(const float* p, int64_t count) {
  return std::bit_cast<Vec<float>>(_mm512_maskz_loadu_ps(__mmask16((1u << count) - 1), p));
}
template <> inline Vec<double> load_some(const double* p, int64_t count) {
  return std::bit_cast<Vec<double>>(_mm512_maskz_loadu_pd(__mmask8((1u << count) - 1), p));
}
template <> inline Vec<float> load_some(const bf16* p, int64_t count) {
  return from_bf16(_mm256_maskz_loadu_epi16(__mmask16((1u << count) - 1), p));
}
template <> inline Vec<float> load_some(const f16* p, int64_t count) {
  return from_f16(_mm256_maskz_loadu_epi16(__mmask16((1u << count) - 1), p));
}
#endif

template <class T> inline void store_some(T* p, Vec<acc_t<T>> v, int64_t count) {
  for (int64_t i = 0; i < count; ++i) p[i] = narrow<T>(v[i]);
}

#if VCL_LEVEL >= 2
template <> inline void store_some(float* p, Vec<float> v, int64_t count) {
  _mm512_mask_storeu_ps(p, __mmask16((1u << count) - 1), std::bit_cast<__m512>(v));
}
template <> inline void store_some(double* p, Vec<double> v, int64_t count) {
  _mm512_mask_storeu_pd(p, __mmask8((1u << count) - 1), std::bit_cast<__m512d>(v));
}
template <> inline void store_some(bf16* p, Vec<float> v, int64_t count) {
  _mm256_mask_storeu_epi16(p, __mmask16((1u << count) - 1), std::bit_cast<__m256i>(to_bf16(v)));
}
template <> inline void store_some(f16* p, Vec<float> v, int64_t count) {
  _mm256_mask_storeu_epi16(p, __mmask16((1u << count) - 1), std::bit_cast<__m256i>(to_f16(v)));
}
#endif

// ---- a whole vector, or the first `count` where fewer are left

template <class T> VCL_IN_LOOP Vec<acc_t<T>> load_up_to(const T* p, int64_t count) {
  return count >= lanes<acc_t<T>> ? load(p) : load_some(p, count);
}

template <bool stream, class T> VCL_IN_LOOP void store_up_to(T* p, Vec<acc_t<T>> v, int64_t count) {
  if (count >= lanes<acc_t<T>>) store<stream>(p, v);
  else store_some(p, v, count);
}

// ---- across lanes

template <class A> inline Vec<A> broadcast(A a) { return Vec<A>{} + a; }

template <class A> inline A sum_lanes(Vec<A> v) {  // pairwise, always in the same order
  typedef A half_t __attribute__((vector_size(32)));
  typedef A quarter_t __attribute__((vector_size(16)));
  half_t h0, h1;
  std::memcpy(&h0, &v, 32);
  std::memcpy(&h1, (const char*)&v + 32, 32);
  h0 += h1;
  quarter_t q0, q1;
  std::memcpy(&q0, &h0, 16);
  std::memcpy(&q1, (const char*)&h0 + 16, 16);
  q0 += q1;
  if constexpr (sizeof(A) == 8) return q0[0] + q0[1];
  else return (q0[0] + q0[2]) + (q0[1] + q0[3]);
}

// ---- float64 parts of a vector: statistics are merged in float64, whatever the accumulation type

template <class A> constexpr int parts = sizeof(double) / sizeof(A);

template <class A> inline Vec<double> part(Vec<A> v, int i) {
  if constexpr (sizeof(A) == 8) {
    return v;
  } else {
#if VCL_LEVEL >= 2  // GCC 12 goes by way of memory
    const __m512 all = std::bit_cast<__m512>(v);
    return std::bit_cast<Vec<double>>(
        _mm512_cvtps_pd(i ? _mm512_extractf32x8_ps(all, 1) : _mm512_castps512_ps256(all)));
#else
    typedef float half_t __attribute__((vector_size(32)));
    half_t half;
    std::memcpy(&half, (const char*)&v + 32 * i, 32);
    return __builtin_convertvector(half, Vec<double>);
#endif
  }
}

template <class A> inline Vec<A> joined(const Vec<double>* from) {
  if constexpr (sizeof(A) == 8) {
    return *from;
  } else {
#if VCL_LEVEL >= 2  // by way of memory, a load would wait for two narrower stores
    const __m256 low = _mm512_cvtpd_ps(std::bit_cast<__m512d>(from[0]));
    const __m256 high = _mm512_cvtpd_ps(std::bit_cast<__m512d>(from[1]));
    return std::bit_cast<Vec<A>>(_mm512_insertf32x8(_mm512_castps256_ps512(low), high, 1));
#else
    typedef float half_t __attribute__((vector_size(32)));
    const half_t half[2] = {__builtin_convertvector(from[0], half_t), __builtin_convertvector(from[1], half_t)};
    Vec<A> v;
    std::memcpy(&v, half, sizeof v);
    return v;
#endif
  }
}

template <class A> inline Vec<A> lane_index() {
  Vec<A> v;
  for (int64_t i = 0; i < lanes<A>; ++i) v[i] = A(i);
  return v;
}
