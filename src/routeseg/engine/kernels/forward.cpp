// A forward of the network on a CPU, for one image: closed paths and dropped cells are not computed.
//
// compiled.py describes the network in these structures and packs its weights; convolution.h and maps.h compute. Gates
// cost no pass over memory: activations are the weights of the sums that the next nodes read, and a path up is added
// where it arrives, at half the size. Compiled once for each instruction set (setup.py). Eq. and Sec. are of the paper.
//
// Legend: L depth, S scales; gates [L+1][S][3], directions up, keep, down.

#include "training.h"

#if defined(__x86_64__) && defined(__linux__)
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

#include <cstddef>
#include <cstdio>
#include <cstdlib>
#include <map>
#include <memory>
#include <new>
#include <type_traits>
#include <utility>

namespace {

constexpr int UP = 0, KEEP = 1, DOWN = 2, DIRECTIONS = 3;
constexpr int STEM_CONVOLUTIONS = 3;
constexpr int GLANCE = 4;                 // of decoder.py
constexpr long SMALL_GLANCE = 2048;       // pixels of the finest features
constexpr int MOST_SCALES = 12;           // MOST_CHANNELS allows no more
constexpr int STEM_BAND = 8;  // rows of the stem's output computed at a time: what lies before them stays in the cache
constexpr float BELOW_ONE = 1 - 1.1920929e-7f;  // activations of gates are below 1

// Bytes of what a block of a backbone has in the middle, at a time: it stays in an L2 cache.
long block_bytes() {
    static const long bytes = [] {
        long size = 0;
#if defined(_SC_LEVEL2_CACHE_SIZE)
        size = sysconf(_SC_LEVEL2_CACHE_SIZE);
#endif
        return size > 0 ? std::clamp(size, 1L << 18, 1L << 22) : 1L << 19;
    }();
    return bytes;
}

// One node; the network lacks it where it has no direction.
struct Node {
    int32_t operations, identity;    // of the cell: separable ones, each of two convolutions, and the input itself
    int32_t directions[DIRECTIONS];  // 1: the node has it
    int32_t gated, small_gate, features;
    const Conv* cell;             // [operations][2]
    Conv transforms[DIRECTIONS];  // keep has none
    Conv squeeze;                 // of the gate: its outputs' means are the `features`
    const float *weight, *bias;   // of the gate: [3][features], [3]
};

// Where an image may leave the grid, behind a layer. Without exits a network has one, behind the last layer.
struct Exit {
    int32_t layer, features, later;  // what its gate reads and predicts: losses at this exit and later ones; 0: no gate
    const Conv* merges;              // of its decoder, [S]
    Conv predictor;
    Conv glance;                          // the predictor, on small maps
    const float *center, *weight, *bias;  // of the gate: [features], [later][features], [later]
};

// An inverted residual of a backbone: to many channels, depthwise and to few.
struct Block {
    int32_t expands, residual;  // 1: it has the first half; its input is added
    Conv expand, depthwise;
};

// A stage of a backbone, and the projection of what it makes to the channels of the grid.
struct Stage {
    int32_t blocks;
    const Block* block;
    Conv project;
};

struct Network {
    int32_t depth, scales, zeros_arrive, classes, exits, stages;
    int32_t place;  // side of the squares of the image that leave by themselves, in pixels; 0: images leave as wholes
    const Conv* stem;    // [3]; with a backbone its first convolution
    const Node* nodes;   // [L+1][S]
    const Exit* exit;    // [exits], the last one behind layer L
    const Stage* stage;  // [stages] of a backbone: the first behind the stem, the others beside paths down the diagonal
    const float* class_weights;  // what a pixel of each class counts where entropy decides, [classes]; null: 1
};

// What a forward is asked for. The image is resized to `seen` before it is looked at; `padded` are multiples of the
// stride. `first` are those of a first look, if there is one (model/closer.py): then `price` and `most` say which
// places are looked at closer.
struct Request {
    Image image;
    int32_t seen_height, seen_width, padded_height, padded_width;
    int32_t first_height, first_width, first_padded_height, first_padded_width;
    const float* given;     // gates of a given route, or null
    int32_t own;            // a given route's open paths have the network's own activations
    const float* prices;    // null, or [exits] price times cost: the image leaves where its gate says so. Without gates
                            // the price itself: where its entropy is not above that
    int64_t* left;          // null, or the exit of each place, [places]: they leave by their entropy; or FIRST_LOOK
    const int32_t* most;    // null, or how many of them go on behind each exit, [exits - 1]: those that need it most
    float price;            // the entropy at which they leave, if there is no `most`; at 0 or less none does
    int32_t told;           // 1: neither counts, `left` says where they leave
    float *gates, *logits;  // of the image's own size; null: not wanted
    uint8_t* labels;        // the most likely class of each pixel, likewise
    int32_t threads;
};

constexpr int FIRST_LOOK = -1;  // in the place of an exit: a place that was not looked at closer

// How a call from Python ended.
enum Status { DONE, NOT_FINITE, NO_MEMORY, DIVERGED, FAILED };

// A map and its memory. `number`: of what was remembered (see Workspace); 0: it depends on the image.
struct Held {
    Map map{};
    std::shared_ptr<void> memory;
    uint64_t number = 0;
};

// Memory that forwards use one after another: fresh memory from the system costs as much as a pass over it. Whoever
// finds the lock taken does without, and so never waits: in a forked child it may stay taken for ever.
//
// It also remembers maps that no image changes: what nodes make of zeros, which is all that reaches them behind closed
// paths of a network where zeros arrive. Each has a number, and is found by what it was made from: zeros by their size,
// for other threads may be at images of another one, all else by numbers, which are never given twice.
class Workspace {
  public:
    using Key = std::vector<uint64_t>;  // an operation, and the numbers and weights of what it read

    ~Workspace() { release(); }

    // The map that was remembered under this key, or one without memory.
    Held constant(const Key& key) {
        std::unique_lock<std::mutex> guard(lock, std::try_to_lock);
        if (!guard.owns_lock()) return {};
        const auto found = constants.find(key);
        return found == constants.end() ? Held{} : found->second;
    }

    // Remembers a map of so many bytes, and gives it a number.
    void remember(const Key& key, Held& map, size_t bytes) {
        std::unique_lock<std::mutex> guard(lock, std::try_to_lock);
        if (!guard.owns_lock()) return;
        if (constant_bytes + bytes > MOST_CONSTANT_BYTES) forget();
        map.number = ++constants_so_far;
        constants[key] = map;
        constant_bytes += bytes;
    }

    // What images of other sizes have left stays, for they may come again, unless it is much, or many others came.
    void expect(const Key& sizes) {
        std::unique_lock<std::mutex> guard(lock, std::try_to_lock);
        if (!guard.owns_lock() || sizes == last_sizes) return;
        last_sizes = sizes;
        ++now;
        if (spare_bytes > MOST_SPARE_BYTES) return release();
        for (auto block = spare.begin(); block != spare.end();)
            block = now - block->second.last > MOST_SIZES ? drop(block) : std::next(block);
    }

    void* take(size_t bytes) {
        if (std::unique_lock<std::mutex> guard(lock, std::try_to_lock); guard.owns_lock()) {
            if (const auto found = spare.find(bytes); found != spare.end()) {
                void* block = std::exchange(found->second.block, nullptr);
                drop(found);
                return block;
            }
        }
        void* block = std::aligned_alloc(LINE, bytes);
        if (!block && forgo()) block = std::aligned_alloc(LINE, bytes);
        if (!block) throw std::bad_alloc();
        large_pages(block, bytes);
        return block;
    }

    void give(void* block, size_t bytes) noexcept {
        try {
            std::unique_lock<std::mutex> guard(lock, std::try_to_lock);
            if (!guard.owns_lock()) {
                std::free(block);
            } else if (block) {
                spare.emplace(bytes, Spare{block, now});
                spare_bytes += bytes;
            }
        } catch (const std::bad_alloc&) {  // for the list itself
            std::free(block);
        }
    }

  private:
    struct Spare {
        void* block;
        uint64_t last;  // when it was used, in changes of size
    };
    using Spares = std::multimap<size_t, Spare>;

    Spares::iterator drop(Spares::iterator which) {
        std::free(which->second.block);
        spare_bytes -= which->first;
        return spare.erase(which);
    }

    void release() {
        while (!spare.empty()) drop(spare.begin());
        forget();
    }

    bool forgo() {  // what is spare, for memory that is needed now
        std::unique_lock<std::mutex> guard(lock, std::try_to_lock);
        if (guard.owns_lock()) release();
        return guard.owns_lock();
    }

    void forget() {
        constants.clear();
        constant_bytes = 0;
    }

    static constexpr size_t MOST_CONSTANT_BYTES = size_t(256) << 20;  // of routes that change, many may come up
    static constexpr size_t MOST_SPARE_BYTES = size_t(1) << 30;
    static constexpr uint64_t MOST_SIZES = 4;  // a video's frames, or images of a budget, alternate between so many

    std::mutex lock;
    Spares spare;
    size_t spare_bytes = 0;
    uint64_t now = 0;
    std::map<Key, Held> constants;
    size_t constant_bytes = 0;
    uint64_t constants_so_far = 0;
    Key last_sizes;
};

// Memory of the maps of one forward: first that of its logits, which are written last, then a workspace's.
class Arena {
  public:
    Arena(Workspace& workspace, void* begin, size_t bytes) : workspace(workspace) {
        large_pages(begin, bytes);
        next = whole_lines(reinterpret_cast<uintptr_t>(begin));
        end = reinterpret_cast<uintptr_t>(begin) + bytes;
    }
    ~Arena() {
        for (auto& [block, bytes] : borrowed) workspace.give(block, bytes);
    }

    std::shared_ptr<void> take(size_t bytes, bool beside_logits) {
        bytes = whole_lines(bytes);
        auto free = beside_logits ? spare.end() : spare.lower_bound(bytes);
        if (free != spare.end() && free->first <= 2 * bytes) {  // the smallest that is large enough
            const auto [size, block] = *free;
            spare.erase(free);
            return held(block, size);
        }
        if (beside_logits || next + bytes > end) {
            borrowed.push_back({nullptr, bytes});  // first: if the list finds no memory, no block is lost
            borrowed.back().first = workspace.take(bytes);
            return held(borrowed.back().first, bytes);
        }
        next += bytes;
        return held(reinterpret_cast<void*>(next - bytes), bytes);
    }

  private:
    static uintptr_t whole_lines(uintptr_t bytes) { return (bytes + LINE - 1) / LINE * LINE; }

    std::shared_ptr<void> held(void* block, size_t bytes) {
        return {block, [this, bytes](void* unused) noexcept {
                    try {
                        spare.emplace(bytes, unused);
                    } catch (const std::bad_alloc&) {  // for the list itself: the block rests until the forward ends
                    }
                }};
    }

    Workspace& workspace;
    uintptr_t next, end;
    std::multimap<size_t, void*> spare;
    std::vector<std::pair<void*, size_t>> borrowed;
};

// What arrives at a node along one edge (Eq. 5): weight times the map; of half the size, along a path up.
struct Arrival {
    Held from;
    float weight;
    bool halved;
};
using Arrivals = std::vector<std::vector<Arrival>>;  // by scale

template <class T>
class Forward {
  public:
    // keeps  what a closer look may read of this one stays
    Forward(const Network& net, const Request& request, Workspace& workspace, bool keeps = false)
        : net(net), request(request), workspace(workspace),
          arena(workspace, request.logits,
                request.logits ? sizeof(float) * net.classes * request.image.height * request.image.width : 0),
          threads(request.threads), keeps(keeps) {}

    // Whether the image's values were finite, and the scores.
    Status run() {
        if (!(request.first_height > 0 ? twice() : walk())) return NOT_FINITE;
        stem_map = {};
        const Image& image = request.image;
        const int seen_height = request.seen_height, seen_width = request.seen_width;
        if (request.labels && !label(scores.map, net.classes, seen_height, seen_width, request.labels, image.height,
                                     image.width, threads))
            return DIVERGED;
        if (request.logits && seen_height == image.height && seen_width == image.width)
            enlarge(scores.map, net.classes, request.logits, image.height, image.width, threads);
        else if (request.logits)
            enlarge_twice(scores.map, net.classes, seen_height, seen_width, request.logits, image.height, image.width,
                          threads);
        return DONE;
    }

  private:
    // The scores of the image; false if its values are not finite.
    bool walk() {
        const int scales = net.scales;
        if (!stem()) return false;
        Arrivals arrivals(scales);
        arrivals[0].push_back({stem_map, 1, false});
        std::vector<char> reached(scales, false);
        reached[0] = true;
        std::fill(request.gates, request.gates + long(net.depth + 1) * scales * DIRECTIONS, 0.0f);
        std::vector<Held> features(scales);
        bool runs = true;  // something of the image is still in
        int exit = 0;      // the one that comes next
        for (int layer = 0; layer <= net.depth && runs; ++layer) {
            Arrivals next(scales);
            std::vector<char> next_reached(scales, false);
            for (int scale = 0; scale < scales; ++scale)  // sums are smaller than what arrives: all of them first
                arrive(features[scale], arrivals[scale], reached[scale], scale);
            if (layer == net.exit[exit].layer + 1) {
                runs = request.left ? places_run(exit, features, reached) : !leaves(exit, features, layer);
                if (runs) ++exit;
            }
            for (int scale = 0; scale < scales; ++scale) {
                Held x = request.left ? features[scale] : std::move(features[scale]);
                float* alpha = request.gates + (layer * scales + scale) * DIRECTIONS;
                if (runs && reached[scale]) visit(layer, scale, std::move(x), alpha, next, next_reached);
                else if (!runs && x.memory) next[scale].push_back({x, 1, false});
            }
            arrivals = std::move(next);
            reached = next_reached;
        }
        for (int scale = 0; scale < scales && runs && request.left; ++scale) {
            if (still) arrive(features[scale], arrivals[scale], reached[scale], scale);
            else if (!reached[scale] && features[scale].memory) arrivals[scale] = {{features[scale], 1, false}};
        }
        if (!still) scores = decoded(arrivals, net.exit[exit]);
        else if (runs) score(net.exit[exit], features, still->places);
        return true;
    }

    // The same of two looks, one at all of the image and a closer one at the places where that is unsure.
    bool twice() {
        Request asked = request;
        asked.seen_height = request.first_height, asked.seen_width = request.first_width;
        asked.padded_height = request.first_padded_height, asked.padded_width = request.first_padded_width;
        asked.logits = nullptr, asked.left = nullptr;
        Forward first(net, asked, workspace, true);
        if (!first.walk()) return false;
        step_y = float(double(request.first_height) / request.seen_height);
        step_x = float(double(request.first_width) / request.seen_width);
        const int side = net.place, height = request.padded_height, width = request.padded_width;
        Mask closer((height + side - 1) / side, (width + side - 1) / side, 0);
        const size_t places = closer.flags.size();
        std::vector<float> need;
        if (!request.told) need = first.unsure(closer, 1 / step_y, 1 / step_x);
        if (request.most && !request.told) mark(closer, need, Mask(closer.h, closer.w, 1), request.most[0]);
        else
            for (size_t place = 0; place < places; ++place)
                closer.flags[place] = request.told ? request.left[place] != FIRST_LOOK
                                                   : !(request.price > 0) || need[place] > request.price;
        for (size_t place = 0; place < places; ++place)
            request.left[place] = closer.flags[place] ? net.exits - 1 : FIRST_LOOK;
        const Map& known = first.scores.map;
        scores = make(height / STEM_STRIDE, width / STEM_STRIDE, known.c, 0, height / STEM_STRIDE, true);
        enlarge_around<float>(scores.map, Pixels(Mask(scores.map.h, scores.map.w, 1)), known, step_y, step_x, 0,
                              scores.map.h, threads);
        if (!closer.any()) return true;
        if (!closer.all()) {
            still.emplace(closer, side, height, width);
            before = &first;
        }
        const bool finite = walk();
        before = nullptr;
        return finite;
    }

    // Of each place of a closer look, the mean entropy of the classes over it; 0 if nothing of it is here.
    std::vector<float> unsure(const Mask& places, float ratio_y, float ratio_x) {
        const Map& map = scores.map;
        const int h = (request.seen_height + STEM_STRIDE - 1) / STEM_STRIDE;  // without the padding
        const int w = (request.seen_width + STEM_STRIDE - 1) / STEM_STRIDE;
        std::vector<float> found(size_t(h) * w);
        pool->rows(h, threads, [&](long y) {
            std::vector<float> share(net.classes);
            for (int x = 0; x < w; ++x)
                found[y * w + x] = unsure_of(row_of<float>(map, int(y)) + long(x) * map.c, share.data());
        });
        std::vector<double> sums(places.flags.size(), 0.0), counts(places.flags.size(), 0.0);
        const auto at = [&](int pixel, float ratio, int most) {
            return std::min(int((float(pixel) + 0.5f) * STEM_STRIDE * ratio / float(net.place)), most - 1);
        };
        for (int y = 0; y < h; ++y)
            for (int x = 0; x < w; ++x) {
                const size_t place = size_t(at(y, ratio_y, places.h)) * places.w + at(x, ratio_x, places.w);
                sums[place] += found[size_t(y) * w + x], counts[place] += 1;
            }
        std::vector<float> means(sums.size());
        for (size_t place = 0; place < sums.size(); ++place)
            means[place] = float(sums[place] / std::max(counts[place], 1.0));
        return means;
    }

    // Marks so many of these places, those that need it most.
    static void mark(Mask& marked, const std::vector<float>& need, const Mask& among, int most) {
        std::vector<int> order;
        for (int place = 0; place < int(need.size()); ++place)
            if (among.flags[place]) order.push_back(place);
        std::stable_sort(order.begin(), order.end(), [&](int a, int b) { return need[a] > need[b]; });
        for (int i = 0; i < std::min(int(order.size()), most); ++i) marked.flags[order[i]] = 1;
    }

    Held make(int h, int w, int c, int first, int rows, bool wide = false) {
        const size_t bytes = (wide ? sizeof(float) : sizeof(T)) * rows * w * c;
        Held held{{nullptr, h, w, c, first, rows}, arena.take(bytes, wide)};  // only the scores are wide
        held.map.data = held.memory.get();
        return held;
    }

    // The map that an operation makes of maps that no image changes: made once. `fill` writes it.
    enum Operation : uint64_t { ZEROS, SUM_OF, CONVOLUTION, SCORES };
    template <class Fill>
    Held constant(const Workspace::Key& key, int h, int w, int c, size_t element, const Fill& fill) {
        if (Held known = workspace.constant(key); known.memory) return known;
        const size_t bytes = (element * h * w * c + LINE - 1) / LINE * LINE;
        Held held{{std::aligned_alloc(LINE, bytes), h, w, c, 0, h}};
        if (!held.map.data) throw std::bad_alloc();
        held.memory = {held.map.data, std::free};
        fill(held.map);
        workspace.remember(key, held, bytes);
        return held;
    }
    static uint64_t number_of(const void* part) { return reinterpret_cast<uintptr_t>(part); }

    void convolve_into(const Conv& conv, const Map& x, const Map& out, const Map* residual, bool relu,
                       bool wide = false, const Pixels* pixels = nullptr) {
        require(bool(conv.wide) == wide, "a convolution's output is of another type");
        require(!residual || (residual->h == out.h && residual->w == out.w && residual->c == out.c),
                "what is added to a convolution has another size");
        const T* added = residual ? static_cast<const T*>(residual->data) : nullptr;
        convolve_any<T>(conv, x, out, added, relu, nullptr, threads, pixels);
    }

    // Of a convolution that is of no further use to others: without what is remembered.
    Held convolved_at(const Pixels* pixels, const Conv& conv, const Held& x, int outputs, bool relu, bool wide) {
        const Map shape = convolved_shape(conv, x.map);
        require(shape.c == outputs, "a convolution's outputs are not as many as the network has there");
        Held out = make(shape.h, shape.w, shape.c, 0, shape.h, wide);
        convolve_into(conv, x.map, out.map, nullptr, relu, wide, pixels);
        return out;
    }

    // `outputs`: channels that the network has there; weights are not read before they agree.
    Held convolved(const Conv& conv, const Held& x, int outputs, const Held* residual = nullptr, bool relu = true) {
        const Map shape = convolved_shape(conv, x.map);
        require(shape.c == outputs, "a convolution's outputs are not as many as the network has there");
        const auto fill = [&](const Map& out) {
            convolve_into(conv, x.map, out, residual ? &residual->map : nullptr, relu, false, over(out));
        };
        if (x.number && (!residual || residual->number))
            return constant({CONVOLUTION, number_of(&conv), x.number, residual ? residual->number : 0, relu}, shape.h,
                            shape.w, shape.c, sizeof(T), fill);
        Held out = make(shape.h, shape.w, shape.c, 0, shape.h);
        fill(out.map);
        return out;
    }

    // The pixels of a map of the grid that are computed; null: all. There is no share of places from which on it would
    // be faster to compute all of them: at 90 % both took as long (camvid_wide_places and the bundled network with
    // places, 360x480; AMD EPYC with AVX2, one thread).
    const Pixels* over(const Map& map) { return still ? &still->area(stride_of(map)).pixels : nullptr; }
    int stride_of(const Map& map) const { return request.padded_height / map.h; }

    // What the first look had in the place of a map of which pixels are filled; null if there was none. To be asked
    // once for each such map: a first look keeps it.
    const Map* known_of(const Held& map) {
        if (keeps) kept_maps.push_back(map);
        return before ? &before->kept_maps.at(before_count++).map : nullptr;
    }

    // `Running.filled`, in place, of these rows: by what is known, or by the mean of the pixels around.
    void fill_rows(const Map& map, const Pixels& around, int reach, int first, int end, const Map* known) {
        if (known) enlarge_around<T>(map, around, *known, step_y, step_x, first, end, threads);
        else fill<T>(map, still->area(stride_of(map)).mask, around, reach, first, end, threads);
    }
    void fill_around(const Map& map, int reach, int first, int end, const Map* known) {
        if (still) fill_rows(map, still->around(stride_of(map), reach), reach, first, end, known);
    }
    Held filled(Held x, int reach) {
        fill_around(x.map, reach, 0, x.map.h, known_of(x));
        return x;
    }

    bool stem() {
        const int height = request.padded_height, width = request.padded_width;
        Held image = make(height, width, 3, 0, height);
        std::optional<Pixels> needed;
        if (still) needed.emplace(grown(still->area(STEM_STRIDE).mask, 1));
        if (!normalized<T>(request.image, request.seen_height, request.seen_width, image.map, threads,
                           needed ? &*needed : nullptr))
            return false;
        if (net.stages) {
            stem_map = staged(0, convolved(net.stem[0], image, net.stem[0].outputs));
            require(stem_map.map.h * STEM_STRIDE == height && stem_map.map.w * STEM_STRIDE == width,
                    "the backbone's first stage has another stride");
            return true;
        }
        Map shape[STEM_CONVOLUTIONS + 1] = {image.map};  // of the image, and behind each convolution
        for (int i = 0; i < STEM_CONVOLUTIONS; ++i) shape[i + 1] = convolved_shape(net.stem[i], shape[i]);
        const Map& last = shape[STEM_CONVOLUTIONS];
        require(last.c == channels(0), "the stem's outputs are not as many as the network has there");
        require(last.h * STEM_STRIDE == height && last.w * STEM_STRIDE == width, "the stem has another stride");
        stem_map = make(last.h, last.w, last.c, 0, last.h);
        for (int begin = 0; begin < last.h; begin += STEM_BAND) {
            int first[STEM_CONVOLUTIONS + 1], end[STEM_CONVOLUTIONS + 1];  // rows that this band needs
            first[STEM_CONVOLUTIONS] = begin;
            end[STEM_CONVOLUTIONS] = std::min(begin + STEM_BAND, last.h);
            for (int i = STEM_CONVOLUTIONS - 1; i > 0; --i) {
                const Conv& conv = net.stem[i];
                first[i] = std::max(0, first[i + 1] * conv.stride - conv.padding);
                end[i] = std::min(shape[i].h, (end[i + 1] - 1) * conv.stride - conv.padding + conv.kernel);
            }
            Held x = image;
            for (int i = 1; i < STEM_CONVOLUTIONS; ++i) {
                Held band = make(shape[i].h, shape[i].w, shape[i].c, first[i], end[i] - first[i]);
                convolve_into(net.stem[i - 1], x.map, band.map, nullptr, true);
                x = band;
            }
            Map rows = stem_map.map;
            rows.first = begin;
            rows.rows = end[STEM_CONVOLUTIONS] - begin;
            rows.data = static_cast<T*>(rows.data) + long(begin) * rows.w * rows.c;
            convolve_into(net.stem[STEM_CONVOLUTIONS - 1], x.map, rows, nullptr, true);
        }
        return true;
    }

    // A stage of the backbone, on what the one before made: its projection. `pretrained` is then what it makes itself.
    Held staged(int number, Held x) {
        const Stage& stage = net.stage[number];
        require(stage.blocks > 0 && stage.block, "a stage of the backbone has no blocks");
        for (int i = 0; i < stage.blocks; ++i) x = inverted(stage.block[i], x);
        pretrained = x;
        return convolved(stage.project, x, channels(number));
    }

    // A block of a backbone, in bands of rows. What it has in the middle is held as far as a band reads it, and all of
    // it where places have left, since little of that is written, or if it is kept.
    Held inverted(const Block& block, const Held& x) {
        const Conv& last = block.depthwise;
        const int reach = last.kernel / 2;
        const Map* added = block.residual ? &x.map : nullptr;
        const Map shape = block.expands ? convolved_shape(block.expand, x.map) : x.map;
        const Map behind = convolved_shape(last, shape);
        require(shape.h == x.map.h && shape.w == x.map.w, "a block's first half has another size");
        const Held out = make(behind.h, behind.w, behind.c, 0, behind.h);
        if (!block.expands) {
            convolve_into(last, filled(x, reach).map, out.map, added, false, false, over(out.map));
            return out;
        }
        const float share = still ? still->share() : 1;
        const float row_bytes = share * float(sizeof(T)) * float(shape.w) * float(shape.c) * float(last.stride);
        const int band = std::max(2, int(std::min(float(block_bytes()) / row_bytes, float(behind.h))));
        const int most = std::min(shape.h, (band - 1) * last.stride + last.kernel);
        const bool whole = still || keeps;
        const Held memory = make(shape.h, shape.w, shape.c, 0, whole ? shape.h : most);
        const Map* known = known_of(memory);
        Map middle = memory.map;
        middle.rows = 0;
        for (int begin = 0, ready = 0; begin < behind.h; begin += band) {
            const Map to = rows_of(out.map, begin, std::min(begin + band, behind.h));
            const int first = std::max(0, begin * last.stride - last.padding);
            const int end = std::min(shape.h, (begin + to.rows - 1) * last.stride - last.padding + last.kernel);
            const int made = middle.first + middle.rows;
            if (!whole) {  // rows that the band before has read, too
                const size_t bytes = sizeof(T) * shape.w * shape.c * std::max(0, made - first);
                std::memmove(middle.data, row_of<T>(middle, first), bytes);
                middle.first = first;
            }
            const int enough = still ? std::min(shape.h, end + reach) : end;  // what is filled reads further
            middle.rows = enough - middle.first;
            const Map fresh = rows_of(middle, std::max(made, middle.first), enough);
            if (fresh.rows > 0) convolve_into(block.expand, x.map, fresh, nullptr, true, false, over(shape));
            fill_around(middle, reach, ready, end, known);
            ready = end;
            const Map beside = added ? rows_of(x.map, begin, begin + to.rows) : Map{};
            convolve_into(last, middle, to, added ? &beside : nullptr, false, false, over(to));
        }
        return out;
    }

    // Some of the rows of a map.
    static Map rows_of(Map map, int first, int end) {
        map.data = const_cast<T*>(row_of<T>(map, first));
        map.first = first, map.rows = end - first;
        return map;
    }

    // Whether the image goes no further than this exit, given the features by scale: as its gate says, or a route that
    // is closed from this layer on.
    bool leaves(int number, const std::vector<Held>& features, int layer) {
        if (!request.prices) {
            if (!request.given) return false;
            const float* rest = request.given + long(layer) * net.scales * DIRECTIONS;
            const float* end = request.given + long(net.depth + 1) * net.scales * DIRECTIONS;
            return std::all_of(rest, end, [](float open) { return open == 0; });
        }
        const Exit& exit = net.exit[number];
        if (!exit.later) return entropies(glanced(exit, features), Mask(1, 1, 1))[0] <= request.prices[number];
        const std::vector<double> seen = classes_of(glanced(exit, features));
        require(int(seen.size()) == exit.features && exit.weight && exit.later == net.exits - number,
                "an exit's gate reads other features than there are");
        float here = 0, behind = 0;
        for (int k = 0; k < exit.later; ++k) {
            double total = exit.bias[k] + request.prices[number + k];
            for (int i = 0; i < exit.features; ++i)
                total += double(exit.weight[k * exit.features + i]) * (seen[i] - exit.center[i]);
            if (k == 0) here = float(total);
            else behind = k == 1 ? float(total) : std::min(behind, float(total));
        }
        return here <= behind;
    }

    // The scores that an exit's decoder makes of small features (`Decoder.glance`), where places run. Without a gate it
    // is an even glance.
    Held glanced(const Exit& exit, const std::vector<Held>& features) {
        const int all_threads = std::exchange(threads, glance_threads());
        Held running;
        const Pixels* pixels = nullptr;
        for (int scale = net.scales - 1; scale >= 0; --scale) {
            const int factor = exit.later ? GLANCE : std::max(GLANCE >> scale, 1);
            const int h = stem_map.map.h >> scale, w = stem_map.map.w >> scale;
            const int small_h = (h + factor - 1) / factor, small_w = (w + factor - 1) / factor;
            if (still) pixels = &still->area((STEM_STRIDE << scale) * factor).pixels;
            Held x = make(small_h, small_w, channels(scale), 0, small_h);
            const Map* map = features[scale].memory ? &features[scale].map : nullptr;
            glance<T>(map, running.memory ? &running.map : nullptr, factor, x.map, threads, pixels);
            running = convolved_at(pixels, exit.merges[scale], x, channels(std::max(scale - 1, 0)), true, false);
        }
        const Held scores = convolved_at(pixels, exit.glance, running, exit.predictor.outputs, false, true);
        require(net.classes <= scores.map.c, "an exit has fewer scores than classes");
        threads = all_threads;
        return scores;
    }

    int glance_threads() const {  // to wake others would take longer
        return long(stem_map.map.h) * stem_map.map.w < SMALL_GLANCE ? 1 : threads;
    }

    // The entropy of the classes of a pixel with these scores; their shares, not yet divided by their sum, go to
    // `share`.
    static float entropy_of(const float* score, int classes, float* share, float& total) {
        const float largest = *std::max_element(score, score + classes);
        float expected = 0;
        total = 0;
        for (int k = 0; k < classes; ++k) {
            share[k] = std::exp(score[k] - largest);
            total += share[k];
            expected += share[k] * (score[k] - largest);
        }
        return std::log(total) - expected / total;
    }

    // The same, times what the pixel counts: as much as the classes that it may be of.
    float unsure_of(const float* score, float* share) {
        float total, weight = 0;
        const float entropy = entropy_of(score, net.classes, share, total);
        if (!net.class_weights) return entropy;
        for (int k = 0; k < net.classes; ++k) weight += net.class_weights[k] * share[k];
        return entropy * weight / total;
    }

    // What a glance's scores say of the image: the share of each class, then its entropy where it is.
    std::vector<double> classes_of(const Held& scores) {
        const int h = scores.map.h, w = scores.map.w, classes = net.classes;
        std::vector<double> rows(long(h) * 2 * classes, 0.0);
        pool->run(h, glance_threads(), [&](long y) {
            double* sums = rows.data() + y * 2 * classes;
            std::vector<float> share(classes);
            for (int x = 0; x < w; ++x) {
                float total;
                const float* score = row_of<float>(scores.map, int(y)) + long(x) * scores.map.c;
                const float entropy = entropy_of(score, classes, share.data(), total);
                for (int k = 0; k < classes; ++k) {
                    sums[k] += share[k] / total;
                    sums[classes + k] += share[k] / total * entropy;
                }
            }
        });
        std::vector<double> seen(2 * classes, 0.0);
        for (size_t i = 0; i < rows.size(); ++i) seen[i % seen.size()] += rows[i] / (double(h) * w);
        return seen;
    }

    // What a glance's scores say of each place that runs, or of the image: the mean entropy over it.
    std::vector<float> entropies(const Held& scores, const Mask& runs) {
        const Map& map = scores.map;
        const int side = net.place ? net.place / (STEM_STRIDE * GLANCE) : MOST_SIDE;
        std::vector<float> means(runs.flags.size(), 0.0f), share(net.classes);
        for (int row = 0; row < runs.h; ++row)
            for (int column = 0; column < runs.w; ++column) {
                if (!runs.row(row)[column]) continue;
                const int top = row * side, bottom = std::min(top + side, int(map.h));
                const int left = column * side, right = std::min(left + side, int(map.w));
                double sum = 0;
                for (int y = top; y < bottom; ++y)
                    for (int x = left; x < right; ++x)
                        sum += unsure_of(row_of<float>(map, y) + long(x) * map.c, share.data());
                means[long(row) * runs.w + column] = float(sum / ((bottom - top) * (right - left)));
            }
        return means;
    }

    // At an exit, given the features by scale and which scales are reached: which places leave there, with their
    // scores. False if none is left.
    bool places_run(int number, std::vector<Held>& features, const std::vector<char>& reached) {
        if (request.first_height > 0 || !(request.price > 0)) return true;
        const int side = net.place, height = request.padded_height, width = request.padded_width;
        const Mask runs = still ? still->places : Mask((height + side - 1) / side, (width + side - 1) / side, 1);
        const size_t places = runs.flags.size();
        std::vector<float> need;
        if (!request.told) {
            std::vector<Held> seen(features);
            for (int scale = 0; scale < net.scales; ++scale)
                if (!reached[scale]) seen[scale] = {};
            need = entropies(glanced(net.exit[number], seen), runs);
        }
        Mask stays(runs.h, runs.w, 0);
        if (request.most && !request.told) mark(stays, need, runs, request.most[number]);
        else
            for (size_t place = 0; place < places; ++place)
                stays.flags[place] = runs.flags[place] && (request.told ? request.left[place] > number
                                                                        : !(need[place] <= request.price));
        const Mask leave = both(runs, stays, false);
        if (!leave.any()) return true;
        for (size_t place = 0; place < places; ++place)
            if (leave.flags[place]) request.left[place] = number;
        if (!still && leave.all()) return false;  // all of the image, as a whole
        if (!still) still.emplace(runs, side, height, width);
        score(net.exit[number], features, leave);
        still.emplace(stays, side, height, width);
        return stays.any();
    }

    // The scores of some of the places that come to an exit: its decoder, on the pixels that these read.
    void score(const Exit& exit, const std::vector<Held>& features, const Mask& places) {
        if (!scores.memory) {
            const Map& finest = stem_map.map;
            scores = make(finest.h, finest.w, exit.predictor.outputs, 0, finest.h, true);
        }
        const Mask wanted = pixels_of(places, net.place / STEM_STRIDE, stem_map.map.h, stem_map.map.w);
        std::vector<Pixels> made, around;  // by scale: what is computed, and what is filled
        Mask read = grown(wanted, 1);
        for (int scale = 0; scale < net.scales; ++scale) {
            const Mask& runs = still->area(STEM_STRIDE << scale).mask;
            const Mask beyond = both(read, runs, false), here = both(either(read, grown(beyond, 1)), runs);
            made.emplace_back(here), around.emplace_back(beyond);
            if (scale + 1 < net.scales) read = halved(here);
        }
        Held total;
        for (int scale = net.scales - 1; scale >= 0; --scale) {
            Held x = features[scale].memory ? features[scale] : gathered({}, scale, channels(scale));
            if (total.memory) {
                const Summand both[] = {{x.map, 1, false}, {total.map, 1, true}};
                const Map& size = x.map;
                x = make(size.h, size.w, size.c, 0, size.h);
                assemble<T>(both, 2, x.map, false, threads, &made[scale]);
            }
            const int outputs = channels(std::max(scale - 1, 0));
            total = convolved_at(&made[scale], exit.merges[scale], x, outputs, true, false);
            fill_rows(total.map, around[scale], 1, 0, total.map.h, known_of(total));
        }
        const Pixels pixels(wanted);
        require(scores.map.c == exit.predictor.outputs, "exits have scores of other numbers of classes");
        convolve_into(exit.predictor, total.map, scores.map, nullptr, false, true, &pixels);
    }

    // What comes to a node, in the place of the features that it had in the layer before: these stay where a place has
    // left, and in a network of places also if nothing comes.
    void arrive(Held& features, std::vector<Arrival>& arrivals, bool reached, int scale) {
        if (!reached && request.left) return;
        if (!reached) features = {};
        else features = still ? kept(std::move(features), arrivals, scale) : gathered(arrivals, scale, channels(scale));
        arrivals.clear();
    }

    // `Running.kept`: what arrives, written where places run into the map that was there before, or into zeros.
    Held kept(Held before, std::vector<Arrival> arrivals, int scale) {
        if (!before.memory || before.number) {  // a map that is remembered stays as it is
            const int h = stem_map.map.h >> scale, w = stem_map.map.w >> scale;
            Held own = make(h, w, channels(scale), 0, h);
            const size_t bytes = sizeof(T) * own.map.w * own.map.c;
            pool->rows(h, threads, [&](long y) {
                void* to = static_cast<char*>(own.map.data) + y * bytes;
                if (before.memory) std::memcpy(to, static_cast<const char*>(before.map.data) + y * bytes, bytes);
                else std::memset(to, 0, bytes);
            });
            before = own;
        }
        if (arrivals.empty()) arrivals.push_back({gathered({}, scale, channels(scale)), 1, false});
        Summand all[SIDES];
        summands(arrivals, all);
        const bool same = arrivals.size() == 1 && all[0].map.data == before.map.data && all[0].weight == 1;
        if (!same)
            assemble<T>(all, int(arrivals.size()), before.map, false, threads,
                        &still->area(STEM_STRIDE << scale).pixels);
        return before;
    }

    static void summands(const std::vector<Arrival>& arrivals, Summand (&all)[SIDES]) {
        require(arrivals.size() <= SIDES, "more arrives at a node than it has sides");
        for (size_t i = 0; i < arrivals.size(); ++i)
            all[i] = {arrivals[i].from.map, arrivals[i].weight, arrivals[i].halved};
    }

    // Eq. 5 at a node: the weighted sum of what arrives; zeros where nothing does.
    Held gathered(const std::vector<Arrival>& arrivals, int scale, int channels, bool relu = false) {
        if (arrivals.size() == 1 && arrivals[0].weight == 1 && !arrivals[0].halved && !relu) return arrivals[0].from;
        const int h = stem_map.map.h >> scale, w = stem_map.map.w >> scale;
        if (arrivals.empty())
            return constant({ZEROS, uint64_t(h), uint64_t(w), uint64_t(channels)}, h, w, channels, sizeof(T),
                            [&](const Map& out) { std::memset(out.data, 0, sizeof(T) * h * w * channels); });
        Summand all[SIDES];
        summands(arrivals, all);
        Workspace::Key key{SUM_OF, uint64_t(relu)};
        bool unchanging = true;
        for (size_t i = 0; i < arrivals.size(); ++i) {
            unchanging = unchanging && arrivals[i].from.number;
            uint32_t weight;
            std::memcpy(&weight, &arrivals[i].weight, sizeof weight);
            key.insert(key.end(), {arrivals[i].from.number, weight, arrivals[i].halved});
        }
        const auto fill = [&](const Map& out) {
            assemble<T>(all, int(arrivals.size()), out, relu, threads, over(out));
        };
        if (unchanging) return constant(key, h, w, channels, sizeof(T), fill);
        Held out = make(h, w, channels, 0, h);
        fill(out.map);
        return out;
    }

    // A node that something arrives at: its gate, its cell, and what it sends to the next layer.
    void visit(int layer, int scale, Held x, float* alpha, Arrivals& next, std::vector<char>& next_reached) {
        const Node& node = net.nodes[layer * net.scales + scale];
        const long edges = (long(layer) * net.scales + scale) * DIRECTIONS;
        activations(node, x, request.given ? request.given + edges : nullptr, alpha);
        if (!(alpha[UP] > 0 || alpha[KEEP] > 0 || alpha[DOWN] > 0)) {  // dropped cell: the input is kept, for free
            next[scale].push_back({x, 1, false});
            next_reached[scale] = true;
            return;
        }
        const Held hidden = cell(node, x, scale);
        x = {};
        for (int direction = UP; direction <= DOWN; ++direction) {
            const int target = scale + direction - KEEP;
            const bool sends = alpha[direction] > 0 || (net.zeros_arrive && node.directions[direction]);
            if (!sends) continue;
            require(target >= 0 && target < net.scales, "a path leads to a scale that the network lacks");
            next_reached[target] = true;
            if (alpha[direction] > 0) {
                Held sent =
                    direction == KEEP ? hidden : convolved(node.transforms[direction], hidden, channels(target));
                if (direction == UP) sent = filled(sent, 1);
                next[target].push_back({sent, alpha[direction], direction == UP});
                if (direction == DOWN && layer == scale && target < net.stages)
                    next[target].push_back({staged(target, pretrained), alpha[direction], false});
            }
        }
    }

    int channels(int scale) const { return net.exit[0].merges[scale].inputs; }

    // Eq. 2-4, times a given route.
    void activations(const Node& node, const Held& x, const float* given, float* alpha) {
        for (int d = 0; d < DIRECTIONS; ++d) alpha[d] = float(node.directions[d]);
        if (node.gated && (!given || request.own)) {
            if (!x.number) {
                gate(node, x.map, alpha);
            } else {
                const Held known = constant({SCORES, number_of(&node), x.number}, 1, 1, DIRECTIONS, sizeof(float),
                                            [&](const Map& out) {
                                                float* to = static_cast<float*>(out.data);
                                                std::copy_n(alpha, DIRECTIONS, to);
                                                gate(node, x.map, to);
                                            });
                std::copy_n(static_cast<const float*>(known.map.data), DIRECTIONS, alpha);
            }
        }
        for (int d = 0; given && d < DIRECTIONS; ++d) alpha[d] *= given[d];
    }

    void gate(const Node& node, const Map& x, float* alpha) {
        Held small;
        const Map* seen = &x;
        if (node.small_gate) {
            const int h = std::max(1, x.h / SMALL_GATE_FACTOR), w = std::max(1, x.w / SMALL_GATE_FACTOR);
            small = make(h, w, x.c, 0, h);
            shrink<T>(x, small.map, threads);
            seen = &small.map;
        }
        require(node.features > 0 && node.features <= node.squeeze.outputs && node.weight && node.bias,
                "a gate has no features");
        std::vector<float> sums(node.squeeze.outputs, 0.0f);
        const Map nothing{nullptr, seen->h, seen->w, node.squeeze.outputs, 0, seen->h};
        convolve_any<T>(node.squeeze, *seen, nothing, nullptr, true, sums.data(), threads);
        const float pixels = float(seen->h) * seen->w;
        float score[DIRECTIONS];
        for (int d = 0; d < DIRECTIONS; ++d) {
            score[d] = node.bias[d];
            for (int i = 0; i < node.features; ++i) score[d] += node.weight[d * node.features + i] * (sums[i] / pixels);
        }
        for (int d = 0; d < DIRECTIONS; ++d)
            if (node.directions[d]) alpha[d] = std::min(std::max(std::tanh(score[d]), 0.0f), BELOW_ONE);
    }

    // ReLU of H of Eq. 1: all transforms read it through a ReLU.
    Held cell(const Node& node, const Held& x, int scale) {
        if (!node.operations) return gathered({{x, 1, false}}, scale, x.map.c, true);
        require(node.operations > 0 && node.cell, "a cell has no operations");
        Held total = node.identity ? x : Held{};
        for (int i = 0; i < node.operations; ++i) {
            const Held middle = filled(convolved(node.cell[2 * i], x, x.map.c), node.cell[2 * i + 1].kernel / 2);
            const bool last = i == node.operations - 1;
            total = convolved(node.cell[2 * i + 1], middle, x.map.c, total.memory ? &total : nullptr, last);
        }
        return total;
    }

    // The scores of the whole image.
    Held decoded(Arrivals& arrivals, const Exit& exit) {
        std::vector<Arrival> running;
        for (int scale = net.scales - 1; scale >= 0; --scale) {
            std::vector<Arrival> incoming = arrivals[scale];
            incoming.insert(incoming.end(), running.begin(), running.end());
            const Held x = gathered(incoming, scale, channels(scale));
            arrivals[scale].clear();
            incoming.clear();
            running.clear();
            const Held merged = convolved(exit.merges[scale], x, channels(std::max(scale - 1, 0)));
            known_of(merged);
            running = {{merged, 1, true}};
        }
        return convolved_at(nullptr, exit.predictor, running[0].from, exit.predictor.outputs, false, true);
    }

    const Network& net;
    const Request& request;
    Workspace& workspace;
    Arena arena;
    int threads;
    Held stem_map, pretrained, scores;
    std::optional<Running> still;  // the places that are still in, once some have left
    bool keeps;
    std::vector<Held> kept_maps;   // by a first look, in the order in which they are filled
    Forward* before = nullptr;     // the first look, of a closer one at some places
    size_t before_count = 0;       // of its maps that were read
    float step_y = 1, step_x = 1;  // pixels of the first look that one of the closer look is
};

thread_local char failure[256];  // what FAILED says, of this thread's last call

// `work` returns a status, or whether all values were finite.
template <class Work>
int guarded(const Work& work) {
    try {
        if constexpr (std::is_same_v<decltype(work()), Status>) return work();
        else return work() ? DONE : NOT_FINITE;
    } catch (const std::bad_alloc&) {
        return NO_MEMORY;
    } catch (const std::exception& error) {
        std::snprintf(failure, sizeof failure, "%s", error.what());
    } catch (...) {
        std::snprintf(failure, sizeof failure, "something that is no std::exception was thrown");
    }
    return FAILED;
}

// What the kernels do not see for themselves.
void check(const Network& net, const Request& request) {
    require(net.depth > 0 && net.scales > 0 && net.scales <= MOST_SCALES, "the network has no size that is supported");
    require(net.stem && net.nodes && net.exit && net.exits > 0 && net.classes > 0, "the network lacks a part");
    require(!net.stages || (net.stage && net.stages > 0 && net.stages <= net.scales), "the backbone lacks a part");
    require(net.exit[net.exits - 1].layer == net.depth, "the last exit is not behind the last layer");
    const int stride = STEM_STRIDE << (net.scales - 1);
    const int height = request.padded_height, width = request.padded_width;
    require(std::min(height, width) > 0 && std::max(height, width) <= MOST_SIDE, "the image is too large");
    require(height % stride == 0 && width % stride == 0, "the image's sides are not padded to the stride");
    require(request.image.height > 0 && request.image.width > 0, "the image has no size");
    require(request.seen_height > 0 && request.seen_width > 0 && request.seen_height <= height &&
                request.seen_width <= width,
            "an image does not fit into its map");
    require(
        !request.first_height ||
            (request.left && net.stages && std::min(request.first_height, request.first_width) > 0 &&
             request.first_height <= request.first_padded_height && request.first_width <= request.first_padded_width &&
             request.first_padded_height % stride == 0 && request.first_padded_width % stride == 0 &&
             std::max(request.first_padded_height, request.first_padded_width) <= MOST_SIDE),
        "a first look has no size that fits");
    require(request.gates && (request.logits || request.labels), "there is no memory for the results");
    require(!request.labels || net.classes <= 256, "there are more classes than labels hold");
    require(request.threads > 0, "there is no thread");
    require(!request.left || (net.place > 0 && net.place % std::max(stride, STEM_STRIDE * GLANCE) == 0),
            "a place is no whole pixels");
}

template <class T>
int forward(const Network* net, const Request* request, void* workspace) {
    return guarded([&] {
        check(*net, *request);
        Workspace& memory = *static_cast<Workspace*>(workspace);
        memory.expect({uint64_t(request->padded_height), uint64_t(request->padded_width),
                       uint64_t(request->first_padded_height), uint64_t(request->first_padded_width)});
        return Forward<T>(*net, *request, memory).run();
    });
}

// Where a structure keeps a field: compiled.py compares it with its own.
struct Field {
    const char* name;
    int32_t offset, size;
};
#define STRUCTURE(type) {#type, 0, sizeof(type)}
#define FIELD(type, name) {#type "." #name, offsetof(type, name), sizeof(type::name)}
// clang-format off
constexpr Field LAYOUT[] = {
    STRUCTURE(Conv), FIELD(Conv, depthwise), FIELD(Conv, kernel), FIELD(Conv, stride), FIELD(Conv, padding),
    FIELD(Conv, ending), FIELD(Conv, wide), FIELD(Conv, inputs), FIELD(Conv, outputs), FIELD(Conv, weights),
    FIELD(Conv, bias), FIELD(Conv, taps), FIELD(Conv, middle), FIELD(Conv, high),
    STRUCTURE(Image), FIELD(Image, data), FIELD(Image, channel_step), FIELD(Image, row_step),
    FIELD(Image, column_step), FIELD(Image, height), FIELD(Image, width), FIELD(Image, is_uint8), FIELD(Image, mean),
    FIELD(Image, std),
    STRUCTURE(Map), FIELD(Map, data), FIELD(Map, h), FIELD(Map, w), FIELD(Map, c), FIELD(Map, first),
    FIELD(Map, rows),
    STRUCTURE(Summand), FIELD(Summand, map), FIELD(Summand, weight), FIELD(Summand, halved),
    STRUCTURE(Node), FIELD(Node, operations), FIELD(Node, identity), FIELD(Node, directions), FIELD(Node, gated),
    FIELD(Node, small_gate), FIELD(Node, features), FIELD(Node, cell), FIELD(Node, transforms), FIELD(Node, squeeze),
    FIELD(Node, weight), FIELD(Node, bias),
    STRUCTURE(Exit), FIELD(Exit, layer), FIELD(Exit, features), FIELD(Exit, later), FIELD(Exit, merges),
    FIELD(Exit, predictor), FIELD(Exit, glance), FIELD(Exit, center), FIELD(Exit, weight), FIELD(Exit, bias),
    STRUCTURE(Block), FIELD(Block, expands), FIELD(Block, residual), FIELD(Block, expand), FIELD(Block, depthwise),
    STRUCTURE(Stage), FIELD(Stage, blocks), FIELD(Stage, block), FIELD(Stage, project),
    STRUCTURE(Network), FIELD(Network, depth), FIELD(Network, scales), FIELD(Network, zeros_arrive),
    FIELD(Network, classes), FIELD(Network, exits), FIELD(Network, stages), FIELD(Network, place),
    FIELD(Network, stem), FIELD(Network, nodes), FIELD(Network, exit), FIELD(Network, stage),
    FIELD(Network, class_weights),
    STRUCTURE(Request), FIELD(Request, image), FIELD(Request, seen_height), FIELD(Request, seen_width), FIELD(Request, padded_height), FIELD(Request, padded_width),
    FIELD(Request, first_height), FIELD(Request, first_width), FIELD(Request, first_padded_height),
    FIELD(Request, first_padded_width), FIELD(Request, given), FIELD(Request, own), FIELD(Request, prices), FIELD(Request, left),
    FIELD(Request, most), FIELD(Request, price), FIELD(Request, told), FIELD(Request, gates), FIELD(Request, logits),
    FIELD(Request, labels), FIELD(Request, threads),
    {nullptr, 0, 0},
};
constexpr Field TRAINING_LAYOUT[] = {
    STRUCTURE(Unit), FIELD(Unit, images), FIELD(Unit, h), FIELD(Unit, w), FIELD(Unit, inputs), FIELD(Unit, outputs),
    FIELD(Unit, kernel), FIELD(Unit, stride), FIELD(Unit, dense), FIELD(Unit, relu), FIELD(Unit, frozen), FIELD(Unit, x), FIELD(Unit, center), FIELD(Unit, a),
    FIELD(Unit, b), FIELD(Unit, taps), FIELD(Unit, weight), FIELD(Unit, gamma), FIELD(Unit, beta),
    FIELD(Unit, running_mean), FIELD(Unit, running_variance), FIELD(Unit, batches), FIELD(Unit, momentum),
    FIELD(Unit, epsilon), FIELD(Unit, z), FIELD(Unit, mean), FIELD(Unit, scale), FIELD(Unit, shift),
    FIELD(Unit, inverse), FIELD(Unit, dz), FIELD(Unit, dscale), FIELD(Unit, dshift), FIELD(Unit, plus),
    FIELD(Unit, dx), FIELD(Unit, da), FIELD(Unit, db), FIELD(Unit, dtaps), FIELD(Unit, dweight), FIELD(Unit, dgamma),
    FIELD(Unit, dbeta),
    STRUCTURE(Term), FIELD(Term, map), FIELD(Term, mean), FIELD(Term, scale), FIELD(Term, shift), FIELD(Term, weight), FIELD(Term, relu),
    FIELD(Term, halved), FIELD(Term, dmap), FIELD(Term, dscale), FIELD(Term, dshift), FIELD(Term, dweight),
    STRUCTURE(Sum), FIELD(Sum, images), FIELD(Sum, h), FIELD(Sum, w), FIELD(Sum, c), FIELD(Sum, terms),
    FIELD(Sum, term), FIELD(Sum, out), FIELD(Sum, dout),
    STRUCTURE(Mean), FIELD(Mean, images), FIELD(Mean, pixels), FIELD(Mean, c), FIELD(Mean, z), FIELD(Mean, mean), FIELD(Mean, scale),
    FIELD(Mean, shift), FIELD(Mean, out), FIELD(Mean, dout), FIELD(Mean, dz), FIELD(Mean, dscale),
    FIELD(Mean, dshift),
    STRUCTURE(Entropy), FIELD(Entropy, images), FIELD(Entropy, classes), FIELD(Entropy, h), FIELD(Entropy, w), FIELD(Entropy, height),
    FIELD(Entropy, width), FIELD(Entropy, scores), FIELD(Entropy, labels), FIELD(Entropy, weights), FIELD(Entropy, ignored),
    FIELD(Entropy, loss), FIELD(Entropy, dscores),
    {nullptr, 0, 0},
};
// clang-format on
#undef STRUCTURE
#undef FIELD

#if defined(__x86_64__)
// Whether the processor multiplies tiles of bfloat16, and the system lets this process use them.
bool has_tiles() {
#if defined(__linux__)
    constexpr unsigned TILE = 1u << 24, BF16 = 1u << 22;                  // of leaf 7, EDX
    constexpr int ARCH_REQ_XCOMP_PERM = 0x1023, XFEATURE_XTILEDATA = 18;  // of the kernel
    unsigned a, b, c, d;
    return __get_cpuid_count(7, 0, &a, &b, &c, &d) && (d & TILE) && (d & BF16) &&
           syscall(SYS_arch_prctl, ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA) == 0;
#else
    return false;
#endif
}
#endif

}  // namespace

extern "C" {

// The best build for this machine, as its place in BUILDS of compiled.py. Ask the generic one: the others may not run.
int routeseg_level() {
#if defined(__x86_64__)
    __builtin_cpu_init();
    if (!__builtin_cpu_supports("avx2") || !__builtin_cpu_supports("fma")) return 0;
    if (!__builtin_cpu_supports("avx512f") || !__builtin_cpu_supports("avx512bw")) return 1;
    if (!__builtin_cpu_supports("avx512bf16")) return 2;
    return has_tiles() ? 4 : 3;
#else
    return 0;
#endif
}

// The fields of all structures, as far as the one without a name; those of training.h.
const Field* routeseg_layout() { return LAYOUT; }
const Field* routeseg_training_layout() { return TRAINING_LAYOUT; }

// Runs all pieces of work on the threads of another pool from now on: `parallel` is libgomp's GOMP_parallel.
void routeseg_share_threads(Parallel parallel) { shared_threads = parallel; }

int routeseg_vector() { return V; }
int routeseg_panel() { return PANEL * V; }
int routeseg_most_channels() { return MOST_CHANNELS; }
int routeseg_most_scales() { return MOST_SCALES; }

void* routeseg_open() { return new (std::nothrow) Workspace; }  // null: out of memory
void routeseg_close(void* workspace) { delete static_cast<Workspace*>(workspace); }

// What a call that ended as FAILED says.
const char* routeseg_failure() { return failure; }

// What returns an int from here on returns a Status. After the forward: single kernels, for benchmarks/kernels.py and
// the tests.
#define ENTRY_POINTS(NAME, T)                                                                                     \
    int routeseg_forward_##NAME(const Network* net, const Request* request, void* workspace) {                    \
        return forward<T>(net, request, workspace);                                                               \
    }                                                                                                             \
    int routeseg_convolve_##NAME(const Conv* conv, const Map* in, const Map* out, const void* residual, int relu, \
                                 float* sums, int threads) {                                                      \
        return guarded([&] {                                                                                      \
            convolve_any<T>(*conv, *in, *out, static_cast<const T*>(residual), relu, sums, threads);              \
            return true;                                                                                          \
        });                                                                                                       \
    }                                                                                                             \
    int routeseg_assemble_##NAME(const Summand* summands, int count, const Map* out, int threads) {               \
        return guarded([&] { return assemble<T>(summands, count, *out, false, threads), true; });                 \
    }                                                                                                             \
    int routeseg_shrink_##NAME(const Map* in, const Map* out, int threads) {                                      \
        return guarded([&] { return shrink<T>(*in, *out, threads), true; });                                      \
    }                                                                                                             \
    int routeseg_normalize_##NAME(const Image* image, const Map* out, int threads) {                              \
        return guarded([&] { return normalized<T>(*image, image->height, image->width, *out, threads); });        \
    }

ENTRY_POINTS(float32, float)
#if defined(__AVX512BF16__)
ENTRY_POINTS(bfloat16, bfloat16)
#endif
#undef ENTRY_POINTS

// Whether pieces of memory hold the same bytes as others do.
int routeseg_same(const void* const* ours, const void* const* theirs, const size_t* bytes, int count, int threads) {
    std::atomic<bool> same{true};
    pool->run(count, threads, [&](long i) {
        if (same.load(std::memory_order_relaxed) && std::memcmp(ours[i], theirs[i], bytes[i])) same = false;
    });
    return same;
}

int routeseg_enlarge(const Map* in, int classes, float* out, int height, int width, int threads) {
    return guarded([&] { return enlarge(*in, classes, out, height, width, threads), true; });
}

// The training step (training.h), forward and backward.
int routeseg_unit(const Unit* unit, int backward, int threads) {
    return guarded([&] {
        check(*unit);
        with_width(unit->dense ? unit->outputs : unit->inputs, unit->outputs, [&](auto width) {
            backward ? unit_backward<width>(*unit, threads) : unit_forward<width>(*unit, threads);
        });
        return true;
    });
}
int routeseg_sum(const Sum* sum, int backward, int threads) {
    return guarded([&] {
        check(*sum);
        with_width(sum->c, sum->c, [&](auto width) {
            backward ? sum_backward<width>(*sum, threads) : sum_forward<width>(*sum, threads);
        });
        return true;
    });
}
int routeseg_mean(const Mean* mean, int backward, int threads) {
    return guarded([&] {
        check(*mean);
        with_width(mean->c, mean->c, [&](auto width) {
            backward ? mean_backward<width>(*mean, threads) : mean_forward<width>(*mean, threads);
        });
        return true;
    });
}
int routeseg_entropy(const Entropy* e, int threads) {
    return guarded([&] {
        check(*e);
        entropy(*e, threads);
        return true;
    });
}

// `threads` tasks that wait for each other, so that as many threads must take one each; 2 at most have their helpers
// for sure, since callers share them. Then helpers throw: std::bad_alloc (throwing 1), or std::runtime_error (2).
int routeseg_meet(int threads, int throwing) {
    return guarded([&] {
        const std::thread::id caller = std::this_thread::get_id();
        std::atomic<int> met{0};
        pool->run(threads, threads, [&](long) {
            for (++met; met < threads;) std::this_thread::yield();
            if (std::this_thread::get_id() == caller) return;
            if (throwing == 1) throw std::bad_alloc();
            if (throwing == 2) throw std::runtime_error("a helper failed");
        });
        return true;
    });
}
}
