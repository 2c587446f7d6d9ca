// Convolutions of feature maps, each in one pass over memory.
//
// A separable convolution is computed tile by tile: its depthwise half fills a tile that stays in the cache, and the
// matrix product of the 1x1 half takes it from there, adds bias and residual, applies ReLU and stores.
//
// Legend: T float or bfloat16 (sums are always float). V floats in a vector. Maps are [h,w,c], c a multiple of V.

#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <stdexcept>
#include <type_traits>
#include <vector>

#include "places.h"
#include "threads.h"
#include "vectors.h"

namespace {

constexpr int ROWS = 6;                 // pixels that the matrix product takes at a time
constexpr int TILE = 16 * ROWS;         // pixels of a tile, at most: 96 x 512 floats are 192 KiB, inside an L2 cache
constexpr int RGB_ROW = 9;              // inputs in a row of the first convolution's 3 x 3 patch
constexpr int SUMS = 32;                // parts that a sum over all pixels is made of
constexpr int MOST_TAPS = 5;            // rows and columns of a depthwise kernel
constexpr int MOST_CHANNELS = 1 << 13;  // of a map; with MOST_SIDE, a row's elements stay far below 2^31
constexpr int MOST_SIDE = 1 << 19;      // of an image, in pixels

// What a kernel demands of its arguments: where it does not hold, memory of others would be read or written.
inline void require(bool holds, const char* text) {
    if (!holds) throw std::invalid_argument(text);
}

// Rows first .. first + rows of a feature map of h x w pixels: of some maps no more is needed at a time.
struct Map {
    void* data;
    int32_t h, w, c, first, rows;
};

struct Conv {
    int32_t depthwise;                        // 1: depthwise k x k, then 1x1. 0: k x k, as a product with patches
    int32_t kernel, stride, padding, ending;  // rows and columns of zeros before the map, and behind it
    int32_t wide;                             // the output is float, whatever the inputs are
    int32_t inputs, outputs;                  // channels of the maps, in whole vectors (an image has 3)
    const void* weights;  // panels of PANEL * V outputs: [inputs][outputs], bfloat16 [inputs / 2][outputs][2]
    const float* bias;    // [outputs]
    const float* taps;    // depthwise: [k * k][inputs]
    const float* middle;  // depthwise: null, or [inputs], the bias of its own before a ReLU that ends at `high`
    float high;           // where a ReLU ends; infinity if it does not
};

template <class T>
const T* row_of(const Map& map, int y) {
    return static_cast<const T*>(map.data) + long(y - map.first) * map.w * map.c;
}

// What follows a depthwise convolution, if its Conv has a `middle`.
struct Middle {
    const float* bias;
    float high;
};

// k x k taps, stride S: BLOCK pixels of an output row from the k input rows (null outside the map), of which the first
// `valid` are stored. `left` is the first column that is read; EDGE: some columns lie outside the map.
template <class T, int K, int S, int BLOCK, bool EDGE>
inline void depthwise_block(const T* const* rows, const Map& in, int left, int valid, const float* taps,
                            const Middle& middle, T* out) {
    constexpr int COLUMNS = (BLOCK - 1) * S + K;
    const long c = in.c;
    for (long i = 0; i < c; i += V) {
        vec sum[BLOCK] = {};
#pragma GCC unroll 8
        for (int ty = 0; ty < K; ++ty) {
            if (!rows[ty]) continue;
            const T* from = rows[ty] + left * c + i;
            vec weight[K];
#pragma GCC unroll 8
            for (int tx = 0; tx < K; ++tx) weight[tx] = load(taps + (ty * K + tx) * c + i);
#pragma GCC unroll 32
            for (int column = 0; column < COLUMNS; ++column) {
                if (EDGE && (left + column < 0 || left + column >= in.w)) continue;
                vec value = load(from + column * c);
                in_register(value);
#pragma GCC unroll 8
                for (int o = 0; o < BLOCK; ++o)
                    if (column - o * S >= 0 && column - o * S < K) sum[o] += weight[column - o * S] * value;
            }
        }
#pragma GCC unroll 8
        for (int o = 0; o < BLOCK; ++o) {
            if (middle.bias) sum[o] = minimum(splat(middle.high), maximum(vec{}, sum[o] + load(middle.bias + i)));
            if (!EDGE || o < valid) store(out + o * c + i, sum[o]);
        }
    }
}

// Pixels x0..x1 of an output row, to out [x1-x0][c], by BLOCKs that share the inputs they load, in registers.
template <class T, int K, int S, int BLOCK = V == 16 && S == 1 && K == 3 ? 8 : 4>
void depthwise_row(const T* const* rows, const Map& in, int padding, int x0, int x1, const float* taps,
                   const Middle& middle, T* out) {
    constexpr int COLUMNS = (BLOCK - 1) * S + K, HALF = std::max(1, BLOCK / 2);
    if (HALF < BLOCK && x1 - x0 <= HALF)
        return depthwise_row<T, K, S, HALF>(rows, in, padding, x0, x1, taps, middle, out);
    for (int x = x0; x < x1; x += BLOCK) {
        if (x + BLOCK > x1) x = std::max(x0, x1 - BLOCK);  // the last one computes some pixels again
        const int left = x * S - padding, valid = std::min(BLOCK, x1 - x);
        const bool inside = left >= 0 && left + COLUMNS <= in.w && valid == BLOCK;
        auto go = inside ? depthwise_block<T, K, S, BLOCK, false> : depthwise_block<T, K, S, BLOCK, true>;
        go(rows, in, left, valid, taps, middle, out + long(x - x0) * in.c);
    }
}

template <class T>
void depthwise(const Conv& conv, const Map& in, int y, int x0, int x1, T* out) {
    const T* rows[MOST_TAPS];
    for (int t = 0; t < conv.kernel; ++t) {
        int from = y * conv.stride - conv.padding + t;
        rows[t] = from >= 0 && from < in.h ? row_of<T>(in, from) : nullptr;
    }
    constexpr decltype(&depthwise_row<T, 3, 1>) KINDS[][2] = {{depthwise_row<T, 3, 1>, depthwise_row<T, 3, 2>},
                                                              {depthwise_row<T, 5, 1>, depthwise_row<T, 5, 2>}};
    const auto go = KINDS[conv.kernel == 5][conv.stride == 2];
    go(rows, in, conv.padding, x0, x1, conv.taps, {conv.middle, conv.high}, out);
}

// The k x k x c inputs of each of the pixels x0..x1 of an output row, side by side: out [x1-x0][depth].
template <class T>
void patches(const Conv& conv, const Map& in, int y, int x0, int x1, int depth, T* out) {
    const int k = conv.kernel, c = in.c;
    for (int x = x0; x < x1; ++x, out += depth) {
        const int left = x * conv.stride - conv.padding;
        const int begin = std::max(0, -left), end = std::min(k, in.w - left);
        const bool inside = begin == 0 && end == k;
        for (int t = 0; t < k; ++t) {
            const int from = y * conv.stride - conv.padding + t;
            T* to = out + t * k * c;
            if (from < 0 || from >= in.h) {
                std::memset(to, 0, sizeof(T) * k * c);
                continue;
            }
            if (inside && k * c == RGB_ROW) {  // of a size that the compiler knows
                std::memcpy(to, row_of<T>(in, from) + long(left) * c, sizeof(T) * RGB_ROW);
                continue;
            }
            if (!inside) std::memset(to, 0, sizeof(T) * k * c);
            std::memcpy(to + begin * c, row_of<T>(in, from) + long(left + begin) * c, sizeof(T) * (end - begin) * c);
        }
        std::memset(out + k * k * c, 0, sizeof(T) * (depth - k * k * c));
    }
}

// sum[r][n] = a[r][:] . weights[:, n], for ROWS pixels and N vectors of outputs.
template <int N>
inline void multiply(const float* const* a, const float* weights, int depth, vec (&sum)[ROWS][N]) {
    for (int r = 0; r < ROWS; ++r)
        for (int n = 0; n < N; ++n) sum[r][n] = vec{};
    for (int k = 0; k < depth; ++k, weights += N * V) {
        vec weight[N];
#pragma GCC unroll 4
        for (int n = 0; n < N; ++n) weight[n] = load(weights + n * V);
#pragma GCC unroll 6
        for (int r = 0; r < ROWS; ++r) {
            vec value = splat(a[r][k]);
#pragma GCC unroll 4
            for (int n = 0; n < N; ++n) sum[r][n] += value * weight[n];
        }
    }
}

#if defined(__AVX512BF16__)
template <int N>
inline void multiply(const bfloat16* const* a, const bfloat16* weights, int depth, vec (&sum)[ROWS][N]) {
    for (int r = 0; r < ROWS; ++r)
        for (int n = 0; n < N; ++n) sum[r][n] = vec{};
    for (int k = 0; k < depth; k += 2, weights += 2 * N * V) {
        __m512bh weight[N];
#pragma GCC unroll 4
        for (int n = 0; n < N; ++n) weight[n] = (__m512bh)_mm512_loadu_si512(weights + 2 * n * V);
#pragma GCC unroll 6
        for (int r = 0; r < ROWS; ++r) {
            int32_t pair;
            std::memcpy(&pair, a[r] + k, sizeof pair);
            __m512bh value = (__m512bh)_mm512_set1_epi32(pair);
#pragma GCC unroll 4
            for (int n = 0; n < N; ++n) sum[r][n] = (vec)_mm512_dpbf16_ps((__m512)sum[r][n], value, weight[n]);
        }
    }
}
#endif

#if defined(__AMX_BF16__)
// Products by tiles of 16 rows (AMX), two by two. While one of these lives, the thread's tiles are ours.
class Tiles {
  public:
    static constexpr int EDGE = 16, DEPTH = 32, PIXELS = 2 * EDGE;

    Tiles() {
        struct alignas(LINE) {
            uint8_t palette = 1, start = 0, unused[14] = {};
            uint16_t bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
            uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
        } shape;
        _tile_loadconfig(&shape);
    }
    ~Tiles() { _tile_release(); }
    Tiles(const Tiles&) = delete;

    // The sums [pixels][N * V] of at most PIXELS rows of a [pixels][depth] with a panel of N vectors of weights. Each
    // pixel's are the same wherever it stands, so that they do not depend on how a map is cut.
    template <int N>
    const float* multiply(const bfloat16* a, int depth, const bfloat16* weights, int pixels) const {
        alignas(LINE) static thread_local float sums[PIXELS * PANEL * V];
        static thread_local std::vector<bfloat16> padded;
        if (pixels < PIXELS) {
            padded.resize(size_t(PIXELS) * depth);
            std::memcpy(padded.data(), a, sizeof(bfloat16) * pixels * depth);
            std::memset(padded.data() + long(pixels) * depth, 0, sizeof(bfloat16) * (PIXELS - pixels) * depth);
            a = padded.data();
        }
        const long a_step = sizeof(bfloat16) * depth, b_step = sizeof(bfloat16) * 2 * N * V;
        for (int n = 0; n < N; n += 2) {
            const bool two = n + 1 < N;
            _tile_zero(0);
            _tile_zero(1);
            _tile_zero(2);
            _tile_zero(3);
            for (int k = 0; k < depth; k += DEPTH) {
                const bfloat16* b = weights + long(k) * N * V + 2 * n * V;
                _tile_loadd(4, a + k, a_step);
                _tile_loadd(5, a + long(EDGE) * depth + k, a_step);
                _tile_loadd(6, b, b_step);
                _tile_dpbf16ps(0, 4, 6);
                _tile_dpbf16ps(1, 5, 6);
                if (!two) continue;
                _tile_loadd(7, b + 2 * V, b_step);
                _tile_dpbf16ps(2, 4, 7);
                _tile_dpbf16ps(3, 5, 7);
            }
            const long step = sizeof(float) * N * V;
            _tile_stored(0, sums + n * V, step);
            _tile_stored(1, sums + (EDGE * N + n) * V, step);
            if (!two) continue;
            _tile_stored(2, sums + (n + 1) * V, step);
            _tile_stored(3, sums + (EDGE * N + n + 1) * V, step);
        }
        return sums;
    }
};
#endif

// What follows the product: x = min(max(sum + bias + residual, low), high), stored, or summed over the pixels.
struct Epilogue {
    const float* bias;     // [outputs]
    const void* residual;  // T [pixels][outputs], with ADD
    float low, high;       // 0 and its end for ReLU, else -infinity and infinity
    void* out;             // [pixels][outputs]: T; float with WIDE; the sums [outputs] with SUM
    int outputs;
    const char* ahead;  // what the next tile reads first is fetched meanwhile, where memory would idle
    long ahead_bytes;
    const int32_t* where;  // null, or where pixel p stands in `out` and `residual`: where[p] - origin
    long origin;

    long place(int p) const { return where ? where[p] - origin : p; }
};
enum Mode { STORE, ADD, WIDE, SUM };

// What follows the product of some pixels with a panel of N vectors of weights.
template <class T, Mode MODE, int N>
class Finish {
  public:
    Finish(const Epilogue& then, int first) : then(then), first(first), low(splat(then.low)), high(splat(then.high)) {
#pragma GCC unroll 4
        for (int n = 0; n < N; ++n) bias[n] = load(then.bias + first + n * V);
    }

    // Fetches what is added to `rows` pixels from p on.
    void fetch(int p, int rows) const {
        if (MODE != ADD) return;
        for (int r = 0; r < rows; ++r)
            for (int i = 0; i < N * V; i += LINE / int(sizeof(T))) __builtin_prefetch(residual(then.place(p + r)) + i);
    }

    // Of one pixel.
    void operator()(int p, const vec (&sum)[N]) {
        const long place = then.place(p);
        Out* out = static_cast<Out*>(then.out) + place * then.outputs + first;
#pragma GCC unroll 4
        for (int n = 0; n < N; ++n) {
            vec x = sum[n] + bias[n];
            if (MODE == ADD) x += load(residual(place) + n * V);
            x = minimum(high, maximum(low, x));
            if (MODE == SUM) total[n] += x;
            else store(out + n * V, x);
        }
    }

    // Behind the last pixel.
    void end() {
        if (MODE != SUM) return;
        for (int n = 0; n < N; ++n) {
            float* to = static_cast<float*>(then.out) + first + n * V;
            store(to, load(to) + total[n]);
        }
    }

  private:
    using Out = std::conditional_t<MODE == WIDE || MODE == SUM, float, T>;
    const T* residual(long place) const { return static_cast<const T*>(then.residual) + place * then.outputs + first; }

    const Epilogue& then;
    const int first;
    const vec low, high;
    vec bias[N], total[N] = {};
};

// The product of `pixels` rows of a [pixels][depth] with a panel of N vectors of weights, and what follows it.
template <class T, Mode MODE, int N>
void panel(const T* a, int depth, const T* weights, int pixels, int first, const Epilogue& then) {
    Finish<T, MODE, N> finish(then, first);
    const long share = (then.ahead_bytes / pixels / LINE + 1) * LINE;
    const auto ahead = [&](int p, int rows) {
        for (long byte = p * share; first == 0 && byte < std::min(then.ahead_bytes, (p + rows) * share); byte += LINE)
            __builtin_prefetch(then.ahead + byte, 0, 2);
    };
#if defined(__AMX_BF16__)
    if (std::is_same_v<T, bfloat16> && depth % Tiles::DEPTH == 0) {
        const Tiles tiles;
        for (int p = 0; p < pixels; p += Tiles::PIXELS) {
            const int rows = std::min(Tiles::PIXELS, pixels - p);
            ahead(p, rows);
            finish.fetch(p, rows);
            const float* sums = tiles.multiply<N>(reinterpret_cast<const bfloat16*>(a) + long(p) * depth, depth,
                                                  reinterpret_cast<const bfloat16*>(weights), rows);
            for (int r = 0; r < rows; ++r) {
                vec sum[N];
#pragma GCC unroll 4
                for (int n = 0; n < N; ++n) sum[n] = load(sums + (r * N + n) * V);
                finish(p + r, sum);
            }
        }
        return finish.end();
    }
#endif
    for (int p = 0; p < pixels; p += ROWS) {
        const int rows = std::min(ROWS, pixels - p);
        const T* at[ROWS];
        for (int r = 0; r < ROWS; ++r) at[r] = a + long(p + std::min(r, rows - 1)) * depth;
        vec sum[ROWS][N];
        ahead(p, ROWS);
        finish.fetch(p, rows);
        multiply<N>(at, weights, depth, sum);
#pragma GCC unroll 6
        for (int r = 0; r < ROWS; ++r) {
            if (r == rows) break;
            finish(p + r, sum[r]);
        }
    }
    finish.end();
}

template <class T, Mode MODE>
void product(const T* a, int depth, const T* weights, int pixels, const Epilogue& then) {
    constexpr decltype(&panel<T, MODE, 1>) PANELS[] = {panel<T, MODE, 1>, panel<T, MODE, 2>,
                                                       panel<T, MODE, std::min(3, PANEL)>, panel<T, MODE, PANEL>};
    for (int first = 0; first < then.outputs;) {
        const int vectors = std::min(PANEL, (then.outputs - first) / V);
        PANELS[vectors - 1](a, depth, weights, pixels, first, then);
        weights += long(depth) * vectors * V;
        first += vectors * V;
    }
}

// Pixels begin..end, counted from the first row of `out`, or of `pixels`. With SUM their sum is added to `sums`
// [outputs] instead.
template <class T, Mode MODE>
void convolve_pixels(const Conv& conv, const Map& in, const Map& out, const T* residual, float low, float* sums,
                     long begin, long end, const Pixels* pixels) {
    const bool direct = !conv.depthwise && conv.kernel == 1 && conv.stride == 1;
    const int patch = conv.kernel * conv.kernel * in.c;
    const int depth = conv.depthwise || direct ? in.c : patch + patch % 2;
    const long size = MODE == WIDE ? sizeof(float) : sizeof(T);
    const long origin = pixels ? long(out.first) * out.w : 0;  // what `begin` counts from, in the numbers of `pixels`
    T* const tile = direct && !pixels ? nullptr : reinterpret_cast<T*>(scratch(sizeof(T) * TILE * depth));
    for (; begin < end; begin += TILE) {
        const long stop = std::min(end, begin + TILE);
        const int32_t* const at = pixels ? pixels->at.data() + begin : nullptr;
        const long first = pixels ? *at - origin : begin;
        const bool whole = !pixels || at[stop - begin - 1] - *at == stop - begin - 1;  // side by side, without gaps
        const T* a = tile;
        if (direct && whole) a = row_of<T>(in, out.first) + first * in.c;
        T* fill = tile;
        for (long p = begin; !(direct && whole) && p < stop;) {
            const long place = pixels ? pixels->at[p] - origin : p;
            const int y = out.first + int(place / out.w), x0 = int(place % out.w);
            const int x1 = pixels ? x0 + pixels->stretch(p, stop) : int(std::min(long(out.w), x0 + stop - p));
            if (conv.depthwise) depthwise<T>(conv, in, y, x0, x1, fill);
            else if (direct) std::memcpy(fill, row_of<T>(in, y) + long(x0) * depth, sizeof(T) * (x1 - x0) * depth);
            else patches<T>(conv, in, y, x0, x1, depth, fill);
            fill += long(x1 - x0) * depth;
            p += x1 - x0;
        }
        const long target = whole ? first : 0;
        void* to = MODE == SUM ? static_cast<void*>(sums) : static_cast<char*>(out.data) + target * out.c * size;
        const float high = low < 0 ? INFINITY : conv.high;
        Epilogue then{conv.bias,
                      MODE == ADD ? residual + target * out.c : nullptr,
                      low,
                      high,
                      to,
                      out.c,
                      nullptr,
                      0,
                      whole ? nullptr : at,
                      origin};
        const int y = (out.first + int(stop / out.w)) * conv.stride - conv.padding + conv.kernel - 1;
        if (!direct && !pixels && stop < end && y < in.first + in.rows) {
            const long x = stop % out.w * conv.stride;
            then.ahead = reinterpret_cast<const char*>(row_of<T>(in, y) + x * in.c);
            then.ahead_bytes = sizeof(T) * in.c * std::min(long(in.w) - x, long(TILE) * conv.stride);
        }
        product<T, MODE>(a, depth, static_cast<const T*>(conv.weights), int(stop - begin), then);
    }
}

// That these kernels know the convolution.
inline void check(const Conv& conv) {
    const int k = conv.kernel;
    require(conv.stride == 1 || conv.stride == 2, "a convolution's stride is neither 1 nor 2");
    require(k == 1 || k == 3 || k == MOST_TAPS, "a convolution's kernel is none of 1, 3 and 5");
    require(!conv.depthwise || k > 1, "a depthwise kernel is of another kind");
    require(conv.padding >= 0 && conv.ending >= 0 && std::max(conv.padding, conv.ending) < k,
            "a convolution's padding is not below its kernel");
    require(conv.high >= 0, "a convolution's ReLU ends below 0");
    require(std::max(conv.inputs, conv.outputs) <= MOST_CHANNELS, "a convolution has too many channels");
    require(conv.outputs > 0 && conv.outputs % V == 0, "a convolution's outputs are no whole vectors");
    const bool image = conv.inputs == 3 && k > 1 && !conv.depthwise;
    require(image || (conv.inputs > 0 && conv.inputs % V == 0), "a convolution's inputs are no whole vectors");
    require(conv.weights && conv.bias && (conv.taps || !conv.depthwise), "a convolution has no weights");
}

// The shape of what a convolution makes of a map, all rows of it, without memory.
inline Map convolved_shape(const Conv& conv, const Map& in) {
    check(conv);
    const int around = conv.padding + conv.ending, h = in.h + around - conv.kernel, w = in.w + around - conv.kernel;
    require(in.c == conv.inputs, "a convolution meets a map of other channels");
    require(h >= 0 && w >= 0, "a convolution meets a map that is smaller than its kernel");
    return {nullptr, h / conv.stride + 1, w / conv.stride + 1, conv.outputs, 0, h / conv.stride + 1};
}

// That `out` has the shape of the convolution of `in`, and that both have the rows that it touches.
inline void check(const Conv& conv, const Map& in, const Map& out, Mode mode) {
    const Map shape = convolved_shape(conv, in);
    require(out.h == shape.h && out.w == shape.w && out.c == shape.c, "a convolution meets a map of another shape");
    require(in.data && (out.data || mode == SUM), "a convolution meets a map without memory");
    const int first = std::max(0, out.first * conv.stride - conv.padding);
    const int end = std::min(in.h, (out.first + out.rows - 1) * conv.stride - conv.padding + conv.kernel);
    require(out.first >= 0 && out.rows > 0 && out.first + out.rows <= out.h && in.first <= first &&
                end <= in.first + in.rows,
            "a convolution meets a map that lacks rows");
}

// The convolution of a map: into the rows of `out`, or with SUM the sum over all pixels into sums [outputs]. They are
// added up in an order that does not depend on the number of threads, so that no result does. With `pixels` only these
// of the rows of `out` are written.
template <class T, Mode MODE>
void convolve(const Conv& conv, const Map& in, const Map& out, const T* residual, float low, float* sums, int threads,
              const Pixels* pixels) {
    check(conv, in, out, MODE);
    require(threads > 0, "a convolution has no thread");
    require(!pixels || (pixels->h == out.h && pixels->w == out.w), "a convolution has pixels of another map");
    const long first = pixels ? pixels->rows[out.first] : 0;
    const long count = pixels ? pixels->rows[out.first + out.rows] - first : long(out.rows) * out.w;
    const long wanted = MODE == SUM ? SUMS : long(threads) * PARTS;
    const long part = (count / wanted / ROWS + 1) * ROWS;  // neighbours: they read the same rows
    const long parts = (count + part - 1) / part;
    std::vector<float> partial(MODE == SUM ? parts * out.c : 0, 0.0f);
    pool->run(parts, threads, [&](long task) {
        const long begin = task * part, end = std::min(count, begin + part);
        float* own = MODE == SUM ? partial.data() + task * out.c : nullptr;
        convolve_pixels<T, MODE>(conv, in, out, residual, low, own, first + begin, first + end, pixels);
    });
    for (long i = 0; i < long(partial.size()); ++i) sums[i % out.c] += partial[i];
}

// The convolution of a map as its mode says: WIDE where the convolution is wide, SUM where there are `sums`.
template <class T>
void convolve_any(const Conv& conv, const Map& in, const Map& out, const T* residual, bool relu, float* sums,
                  int threads, const Pixels* pixels = nullptr) {
    auto go = sums        ? convolve<T, SUM>
              : conv.wide ? convolve<T, WIDE>
              : residual  ? convolve<T, ADD>
                          : convolve<T, STORE>;
    go(conv, in, out, residual, relu ? 0.0f : -INFINITY, sums, threads, pixels);
}

}  // namespace
