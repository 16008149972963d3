/* Loads and stores of elements of 16 bits, by whole registers: a part of words.h.
 *
 * Bit for bit what short.h does one at a time. AVX512_BF16's conversion, behind a test for NaN and
 * for the subnormal numbers that it drops, was no gain: 0.87 to 1.15 of the time. */
#ifndef FASTNORM_NARROW_H
#define FASTNORM_NARROW_H

typedef uint16_t short_vec __attribute__((vector_size(FN_VECTOR / 2)));
typedef uint32_t bits_vec __attribute__((vector_size(FN_VECTOR)));
typedef uint16_t two_shorts __attribute__((vector_size(FN_VECTOR)));

#if defined(FN_TYPE_bfloat16)
static inline work widen(stored v) { return fn_widen_bfloat16(v); }
static inline uint16_t narrow(work v) { return fn_narrow_bfloat16(v); }

static inline vec widen_all(short_vec x)
{
#if defined(__AVX512BW__)
    /* The words to the upper halves, by one permutation. */
    const two_shorts upper = {0, 0, 0, 1, 0, 2, 0, 3, 0, 4, 0, 5, 0, 6, 0, 7,
                              0, 8, 0, 9, 0, 10, 0, 11, 0, 12, 0, 13, 0, 14, 0, 15};
    return (vec)_mm512_maskz_permutexvar_epi16(0xaaaaaaaa, (__m512i)upper,
                                               _mm512_castsi256_si512((__m256i)x));
#elif defined(__AVX2__) /* gcc goes by halves otherwise */
    return (vec)_mm256_slli_epi32(_mm256_cvtepu16_epi32((__m128i)x), 16);
#else
    return (vec)(__builtin_convertvector(x, bits_vec) << 16);
#endif
}

/* Rounded in the upper halves; NaN may become anything. */
static inline bits_vec round_numbers(vec v)
{
#if defined(__AVX512F__)
    const __mmask16 odd = _mm512_test_epi32_mask((__m512i)v, _mm512_set1_epi32(0x10000));
    const __m512i rounded = _mm512_add_epi32((__m512i)v, _mm512_set1_epi32(0x7fff));
    return (bits_vec)_mm512_mask_add_epi32(rounded, odd, (__m512i)v, _mm512_set1_epi32(0x8000));
#else
    const bits_vec bits = (bits_vec)v;
    return bits + 0x7fff + (bits >> 16 & 1);
#endif
}

/* fn_narrow_bfloat16 of every lane. */
static inline short_vec narrow_all(vec v)
{
#if defined(__AVX512BW__)
    const two_shorts upper = {1, 3, 5, 7, 9, 11, 13, 15, 17, 19, 21, 23, 25, 27, 29, 31};
    const __mmask16 nan = _mm512_cmp_ps_mask((__m512)v, (__m512)v, _CMP_UNORD_Q);
    const __m512i rounded = _mm512_mask_or_epi32((__m512i)round_numbers(v), nan, (__m512i)v,
                                                 _mm512_set1_epi32(0x400000));
    return (short_vec)_mm512_castsi512_si256(
        _mm512_permutexvar_epi16((__m512i)upper, rounded));
#else
    const bits_vec bits = (bits_vec)v;
    const bits_vec nan = (bits_vec)((bits & 0x7fffffff) > 0x7f800000);
    const bits_vec chosen = ((nan & (bits | 0x400000)) | (~nan & round_numbers(v))) >> 16;
#if defined(__AVX2__)
    const __m256i packed = _mm256_packus_epi32((__m256i)chosen, (__m256i)chosen);
    return (short_vec)_mm256_castsi256_si128(_mm256_permute4x64_epi64(packed, 8));
#else
    return __builtin_convertvector(chosen, short_vec);
#endif
#endif
}

#if defined(__SSE4_1__)
/* Numbers, one vector behind the other. (Lower halves compared for both vectors at once, two
 * permutations instead of one and 5 instructions instead of 7, took 1.03 times as long.) */
static inline two_shorts narrow_numbers(vec a, vec b)
{
    const bits_vec first = round_numbers(a), second = round_numbers(b);
#if defined(__AVX512BW__)
    const two_shorts upper = {1,  3,  5,  7,  9,  11, 13, 15, 17, 19, 21, 23, 25, 27, 29, 31,
                              33, 35, 37, 39, 41, 43, 45, 47, 49, 51, 53, 55, 57, 59, 61, 63};
    return (two_shorts)_mm512_permutex2var_epi16((__m512i)first, (__m512i)upper, (__m512i)second);
#elif defined(__AVX2__)
    return (two_shorts)_mm256_permute4x64_epi64(
        _mm256_packus_epi32((__m256i)(first >> 16), (__m256i)(second >> 16)), 0xd8);
#else
    return (two_shorts)_mm_packus_epi32((__m128i)(first >> 16), (__m128i)(second >> 16));
#endif
}

static inline int any_nan(vec a, vec b)
{
#if defined(__AVX512F__)
    return _mm512_cmp_ps_mask((__m512)a, (__m512)b, _CMP_UNORD_Q) != 0;
#elif defined(__AVX__)
    return _mm256_movemask_ps(_mm256_cmp_ps((__m256)a, (__m256)b, _CMP_UNORD_Q)) != 0;
#else
    return _mm_movemask_ps(_mm_cmpunord_ps((__m128)a, (__m128)b)) != 0;
#endif
}
#endif
#else
#if defined(__F16C__)
static inline work widen(stored v) { return _cvtsh_ss(v); }
static inline uint16_t narrow(work v) { return _cvtss_sh(v, _MM_FROUND_TO_NEAREST_INT); }
#elif defined(__aarch64__)
static inline work widen(stored v)
{
    __fp16 half;
    memcpy(&half, &v, sizeof half);
    return half;
}

static inline uint16_t narrow(work v)
{
    const __fp16 half = (__fp16)v;
    uint16_t bits;
    memcpy(&bits, &half, sizeof bits);
    return bits;
}
#else
static inline work widen(stored v) { return fn_widen_float16(v); }
static inline uint16_t narrow(work v) { return fn_narrow_float16(v); }
#endif

static inline vec widen_all(short_vec x)
{
#if defined(__AVX512F__)
    return (vec)_mm512_cvtph_ps((__m256i)x);
#elif defined(__F16C__)
    return (vec)_mm256_cvtph_ps((__m128i)x);
#elif defined(__aarch64__)
    return (vec)vcvt_f32_f16((float16x4_t)x);
#else
    vec v;
    for (int j = 0; j < WIDTH; j++) v[j] = fn_widen_float16(x[j]);
    return v;
#endif
}

static inline short_vec narrow_all(vec v)
{
#if defined(__AVX512F__)
    return (short_vec)_mm512_cvtps_ph((__m512)v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
#elif defined(__F16C__)
    return (short_vec)_mm256_cvtps_ph((__m256)v, _MM_FROUND_TO_NEAREST_INT);
#elif defined(__aarch64__)
    return (short_vec)vcvt_f16_f32((float32x4_t)v);
#else
    short_vec x;
    for (int j = 0; j < WIDTH; j++) x[j] = fn_narrow_float16(v[j]);
    return x;
#endif
}
#endif

static inline vec load(const stored *x)
{
    short_vec v;
    memcpy(&v, x, sizeof v);
    return widen_all(v);
}

static inline void store(stored *y, vec v)
{
    const short_vec narrow = narrow_all(v);
    memcpy(y, &narrow, sizeof narrow);
}

/* A value that differences are taken from, rounded to one that is stored. Else the lowest bits of
 * all differences would be the same, and every addition would round them the same way: statistics
 * ten times as far off. */
static inline work on_grid(work value) { return widen(narrow(value)); }

static inline vec load_part(const stored *x, int64_t n, work fill)
{
#if defined(__AVX512BW__) && defined(__AVX512VL__)
    const __mmask16 mask = (__mmask16)lanes_below(n);
    const vec v = widen_all((short_vec)_mm256_maskz_loadu_epi16(mask, x));
    return (vec)_mm512_mask_mov_ps(_mm512_set1_ps(fill), mask, (__m512)v);
#elif defined(__AVX2__)
    const int there = (int)(n < 0 ? 0 : n < WIDTH ? n : WIDTH);
    const __m128i pairs = _mm_cmpgt_epi32(_mm_set1_epi32(there / 2), _mm_setr_epi32(0, 1, 2, 3));
    __m128i bits = _mm_maskload_epi32((const int *)x, pairs);
    if (there % 2) {
        const __m128i places = _mm_setr_epi16(1, 2, 3, 4, 5, 6, 7, 8);
        const __m128i last = _mm_cmpeq_epi16(_mm_set1_epi16((short)there), places);
        bits = _mm_or_si128(bits, _mm_and_si128(last, _mm_set1_epi16((short)x[there - 1])));
    }
    return choose(lanes_below(there), widen_all((short_vec)bits), splat(fill));
#else
    stored t[WIDTH] = {0};
    vec v;
    for (int j = 0; j < WIDTH && j < n; j++) t[j] = x[j];
    v = load(t);
    for (int j = 0; j < WIDTH; j++) v[j] = j < n ? v[j] : fill;
    return v;
#endif
}

static inline void store_part(stored *y, int64_t n, vec v)
{
    const short_vec narrow = narrow_all(v);
#if defined(__AVX512BW__) && defined(__AVX512VL__)
    _mm256_mask_storeu_epi16(y, (__mmask16)lanes_below(n), (__m256i)narrow);
#elif defined(__AVX__)
    if (n == WIDTH)
        memcpy(y, &narrow, sizeof narrow);
    else
        store_bytes(y, n * (int64_t)sizeof *y, (vec)_mm256_castsi128_si256((__m128i)narrow));
#else
    memcpy(y, &narrow, (size_t)n * sizeof *y);
#endif
}

#endif
