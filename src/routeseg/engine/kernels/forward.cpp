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

#include <chrono>
#include <cstddef>
#include <cstdio>
#include <cstdlib>
#include <map>
#include <memory>
#include <new>
#include <utility>

namespace {

constexpr int UP = 0, KEEP = 1, DOWN = 2, DIRECTIONS = 3;
constexpr int STEM_CONVOLUTIONS = 3, STEM_STRIDE = 4;
constexpr int GLANCE = 4;                 // of decoder.py
constexpr long SMALL_GLANCE = 128 * 128;  // pixels of the finest features
constexpr int MOST_SCALES = 12;           // MOST_CHANNELS allows no more
constexpr long BLOCK_BYTES = 1 << 19;     // of what a block has in the middle, at a time: it stays in an L2 cache
constexpr int STEM_BAND = 8;  // rows of the stem's output computed at a time: what lies before them stays in the cache
constexpr float BELOW_ONE = 1 - 1.1920929e-7f;  // activations of gates are below 1

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

// A place where an image may leave the grid, behind a layer. Without exits a network has one, behind the last layer.
struct Exit {
    int32_t layer, features, later;  // what its gate reads and predicts: losses at this exit and those behind it
    const Conv* merges;              // of its decoder, [S]
    Conv predictor;
    Conv glance;                          // the predictor, on small maps
    const float *center, *weight, *bias;  // of the gate: [features], [later][features], [later]; null: the last exit
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
    const Conv* stem;    // [3]; with a backbone its first convolution
    const Node* nodes;   // [L+1][S]
    const Exit* exit;    // [exits], the last one behind layer L
    const Stage* stage;  // [stages] of a backbone: the first behind the stem, the others beside paths down the diagonal
};

// What a forward is asked for. Raster sizes are those of the image; `padded` ones are multiples of the stride.
struct Request {
    Image image;
    int32_t padded_height, padded_width;
    const float* given;   // gates of a given route, or null
    int32_t own;          // a given route's open paths have the network's own activations
    const float* prices;  // null, or price times cost of each exit: the image leaves where its gate says so
    float *gates, *logits;
    double* seconds;  // null, or [L+1][S][6] gather, gate, cell, up, down, stage; then stem, decoder
    int32_t threads;
};

enum { GATHER, GATE, CELL, SEND_UP, SEND_DOWN, STAGE, STEPS };

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

    // Lets go of what images of another size have left.
    void expect(int height, int width) {
        std::unique_lock<std::mutex> guard(lock, std::try_to_lock);
        if (!guard.owns_lock() || (height == last_height && width == last_width)) return;
        last_height = height, last_width = width;
        release();
    }

    void* take(size_t bytes) {
        if (std::unique_lock<std::mutex> guard(lock, std::try_to_lock); guard.owns_lock()) {
            std::vector<void*>& blocks = spare[bytes];
            if (!blocks.empty()) {
                void* block = blocks.back();
                blocks.pop_back();
                return block;
            }
        }
        void* block = std::aligned_alloc(LINE, bytes);
        if (!block) throw std::bad_alloc();
        large_pages(block, bytes);
        return block;
    }

    void give(void* block, size_t bytes) noexcept {
        try {
            std::unique_lock<std::mutex> guard(lock, std::try_to_lock);
            if (!guard.owns_lock()) std::free(block);
            else if (block) spare[bytes].push_back(block);
        } catch (const std::bad_alloc&) {  // for the list itself
            std::free(block);
        }
    }

  private:
    void release() {
        for (auto& [size, blocks] : spare)
            for (void* block : blocks) std::free(block);
        spare.clear();
        forget();
    }

    void forget() {
        constants.clear();
        constant_bytes = 0;
    }

    static constexpr size_t MOST_CONSTANT_BYTES = size_t(256) << 20;  // of routes that change, many may come up

    std::mutex lock;
    std::map<size_t, std::vector<void*>> spare;
    std::map<Key, Held> constants;
    size_t constant_bytes = 0;
    uint64_t constants_so_far = 0;
    int last_height = 0, last_width = 0;
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

class Clock {
  public:
    explicit Clock(double* seconds) : seconds(seconds), start(Now::now()) {}
    void lap(long place) {
        if (!seconds) return;
        const Now::time_point now = Now::now();
        seconds[place] += std::chrono::duration<double>(now - start).count();
        start = now;
    }

  private:
    using Now = std::chrono::steady_clock;
    double* seconds;
    Now::time_point start;
};

template <class T>
class Forward {
  public:
    Forward(const Network& net, const Request& request, Workspace& workspace)
        : net(net), request(request), workspace(workspace),
          arena(workspace, request.logits, sizeof(float) * net.classes * request.image.height * request.image.width),
          threads(request.threads), clock(request.seconds) {}

    // False where the image has values that are not finite.
    bool run() {
        const int scales = net.scales;
        if (!stem()) return false;
        const long steps = long(net.depth + 1) * scales * STEPS;
        clock.lap(steps);
        Arrivals arrivals(scales);
        arrivals[0].push_back({stem_map, 1, false});
        std::vector<char> reached(scales, false);
        reached[0] = true;
        std::fill(request.gates, request.gates + long(net.depth + 1) * scales * DIRECTIONS, 0.0f);
        int exit = 0;  // the one that comes next
        for (int layer = 0; layer <= net.depth; ++layer) {
            Arrivals next(scales);
            std::vector<char> next_reached(scales, false);
            std::vector<Held> features(scales);
            for (int scale = 0; scale < scales; ++scale) {  // sums are smaller than what arrives: all of them first
                if (!reached[scale]) continue;
                features[scale] = gathered(arrivals[scale], scale, channels(scale));
                arrivals[scale].clear();
                clock.lap((long(layer) * scales + scale) * STEPS + GATHER);
            }
            if (layer == net.exit[exit].layer + 1) {
                if (leaves(exit, features, layer)) {
                    for (int scale = 0; scale < scales; ++scale)
                        if (reached[scale]) arrivals[scale].push_back({std::move(features[scale]), 1, false});
                    break;
                }
                ++exit;
            }
            for (int scale = 0; scale < scales; ++scale) {
                float* alpha = request.gates + (layer * scales + scale) * DIRECTIONS;
                if (reached[scale]) visit(layer, scale, std::move(features[scale]), alpha, next, next_reached);
            }
            arrivals = std::move(next);
            reached = next_reached;
        }
        decode(arrivals, net.exit[exit]);
        clock.lap(steps + 1);
        return true;
    }

  private:
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
                       bool wide = false) {
        require(bool(conv.wide) == wide, "a convolution's output is of another type");
        require(!residual || (residual->h == out.h && residual->w == out.w && residual->c == out.c),
                "what is added to a convolution has another size");
        const T* added = residual ? static_cast<const T*>(residual->data) : nullptr;
        convolve_any<T>(conv, x, out, added, relu, nullptr, threads);
    }

    // `outputs`: channels that the network has there; weights are not read before they agree.
    Held convolved(const Conv& conv, const Held& x, int outputs, const Held* residual = nullptr, bool relu = true,
                   bool wide = false) {
        const Map shape = convolved_shape(conv, x.map);
        require(shape.c == outputs, "a convolution's outputs are not as many as the network has there");
        const auto fill = [&](const Map& out) {
            convolve_into(conv, x.map, out, residual ? &residual->map : nullptr, relu, wide);
        };
        if (x.number && (!residual || residual->number) && !wide)
            return constant({CONVOLUTION, number_of(&conv), x.number, residual ? residual->number : 0, relu}, shape.h,
                            shape.w, shape.c, sizeof(T), fill);
        Held out = make(shape.h, shape.w, shape.c, 0, shape.h, wide);
        fill(out.map);
        return out;
    }

    bool stem() {
        const int height = request.padded_height, width = request.padded_width;
        workspace.expect(height, width);
        Held image = make(height, width, 3, 0, height);
        if (!normalized<T>(request.image, image.map, threads)) return false;
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

    // A block of a backbone, in bands of rows.
    Held inverted(const Block& block, const Held& x) {
        const Conv& last = block.depthwise;
        const Map* added = block.residual ? &x.map : nullptr;
        const Map shape = block.expands ? convolved_shape(block.expand, x.map) : x.map;
        Map rows = convolved_shape(last, shape);
        require(shape.h == x.map.h && shape.w == x.map.w, "a block's first half has another size");
        const Held out = make(rows.h, rows.w, rows.c, 0, rows.h);
        if (!block.expands) {
            convolve_into(last, x.map, out.map, added, false);
            return out;
        }
        const long row_bytes = long(sizeof(T)) * shape.w * shape.c * last.stride;
        const int band = int(std::clamp<long>(BLOCK_BYTES / row_bytes, 2, rows.h));
        for (rows.first = 0; rows.first < rows.h; rows.first += band) {
            rows.rows = std::min(band, rows.h - rows.first);
            const int first = std::max(0, rows.first * last.stride - last.padding);
            const int end = std::min(shape.h, (rows.first + rows.rows - 1) * last.stride - last.padding + last.kernel);
            const Held hidden = make(shape.h, shape.w, shape.c, first, end - first);
            convolve_into(block.expand, x.map, hidden.map, nullptr, true);
            const long offset = long(rows.first) * rows.w * rows.c;
            rows.data = static_cast<T*>(out.map.data) + offset;
            Map beside = x.map;
            beside.data = static_cast<T*>(x.map.data) + offset;
            convolve_into(last, hidden.map, rows, added ? &beside : nullptr, false);
        }
        return out;
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
        const std::vector<double> seen = glanced(exit, features);
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

    // What an exit's decoder makes of small features: the share of each class, then its entropy where it is.
    std::vector<double> glanced(const Exit& exit, const std::vector<Held>& features) {
        const bool small = long(stem_map.map.h) * stem_map.map.w < SMALL_GLANCE;
        const int all_threads = std::exchange(threads, small ? 1 : threads);  // to wake them would take longer
        Held running;
        for (int scale = net.scales - 1; scale >= 0; --scale) {
            const int h = stem_map.map.h >> scale, w = stem_map.map.w >> scale;
            const int small_h = (h + GLANCE - 1) / GLANCE, small_w = (w + GLANCE - 1) / GLANCE;
            Held x = make(small_h, small_w, channels(scale), 0, small_h);
            const Map* map = features[scale].memory ? &features[scale].map : nullptr;
            glance<T>(map, running.memory ? &running.map : nullptr, GLANCE, x.map, threads);
            running = convolved(exit.merges[scale], x, channels(std::max(scale - 1, 0)));
        }
        const Held scores = convolved(exit.glance, running, exit.predictor.outputs, nullptr, false, true);
        require(net.classes <= scores.map.c, "an exit has fewer scores than classes");
        const int h = scores.map.h, w = scores.map.w, classes = net.classes;
        std::vector<double> rows(long(h) * 2 * classes, 0.0);
        pool->run(h, threads, [&](long y) {
            double* sums = rows.data() + y * 2 * classes;
            std::vector<float> share(classes);
            for (int x = 0; x < w; ++x) {
                const float* score = row_of<float>(scores.map, int(y)) + long(x) * scores.map.c;
                const float largest = *std::max_element(score, score + classes);
                float total = 0, expected = 0;
                for (int k = 0; k < classes; ++k) {
                    share[k] = std::exp(score[k] - largest);
                    total += share[k];
                    expected += share[k] * (score[k] - largest);
                }
                const float entropy = std::log(total) - expected / total;
                for (int k = 0; k < classes; ++k) {
                    sums[k] += share[k] / total;
                    sums[classes + k] += share[k] / total * entropy;
                }
            }
        });
        threads = all_threads;
        std::vector<double> seen(2 * classes, 0.0);
        for (size_t i = 0; i < rows.size(); ++i) seen[i % seen.size()] += rows[i] / (double(h) * w);
        return seen;
    }

    // Eq. 5 at a node: the weighted sum of what arrives; zeros where nothing does.
    Held gathered(const std::vector<Arrival>& arrivals, int scale, int channels, bool relu = false) {
        if (arrivals.size() == 1 && arrivals[0].weight == 1 && !arrivals[0].halved && !relu) return arrivals[0].from;
        const int h = stem_map.map.h >> scale, w = stem_map.map.w >> scale;
        if (arrivals.empty())
            return constant({ZEROS, uint64_t(h), uint64_t(w), uint64_t(channels)}, h, w, channels, sizeof(T),
                            [&](const Map& out) { std::memset(out.data, 0, sizeof(T) * h * w * channels); });
        require(arrivals.size() <= SIDES, "more arrives at a node than it has sides");
        Summand all[SIDES];
        Workspace::Key key{SUM_OF, uint64_t(relu)};
        bool unchanging = true;
        for (size_t i = 0; i < arrivals.size(); ++i) {
            all[i] = {arrivals[i].from.map, arrivals[i].weight, arrivals[i].halved};
            unchanging = unchanging && arrivals[i].from.number;
            uint32_t weight;
            std::memcpy(&weight, &arrivals[i].weight, sizeof weight);
            key.insert(key.end(), {arrivals[i].from.number, weight, arrivals[i].halved});
        }
        const auto fill = [&](const Map& out) { assemble<T>(all, int(arrivals.size()), out, relu, threads); };
        if (unchanging) return constant(key, h, w, channels, sizeof(T), fill);
        Held out = make(h, w, channels, 0, h);
        fill(out.map);
        return out;
    }

    // A node that something arrives at: its gate, its cell, and what it sends to the next layer.
    void visit(int layer, int scale, Held x, float* alpha, Arrivals& next, std::vector<char>& next_reached) {
        const Node& node = net.nodes[layer * net.scales + scale];
        const long place = (long(layer) * net.scales + scale) * STEPS;
        const long edges = (long(layer) * net.scales + scale) * DIRECTIONS;
        activations(node, x, request.given ? request.given + edges : nullptr, alpha);
        clock.lap(place + GATE);
        if (!(alpha[UP] > 0 || alpha[KEEP] > 0 || alpha[DOWN] > 0)) {  // dropped cell: the input is kept, for free
            next[scale].push_back({x, 1, false});
            next_reached[scale] = true;
            return;
        }
        const Held hidden = cell(node, x, scale);
        x = {};
        clock.lap(place + CELL);
        for (int direction = UP; direction <= DOWN; ++direction) {
            const int target = scale + direction - KEEP;
            const bool sends = alpha[direction] > 0 || (net.zeros_arrive && node.directions[direction]);
            if (!sends) continue;
            require(target >= 0 && target < net.scales, "a path leads to a scale that the network lacks");
            next_reached[target] = true;
            if (alpha[direction] > 0) {
                const bool same = direction == KEEP;
                next[target].push_back({same ? hidden : convolved(node.transforms[direction], hidden, channels(target)),
                                        alpha[direction], direction == UP});
                if (!same) clock.lap(place + (direction == UP ? SEND_UP : SEND_DOWN));
                if (direction == DOWN && layer == scale && target < net.stages) {
                    next[target].push_back({staged(target, pretrained), alpha[direction], false});
                    clock.lap(place + STAGE);
                }
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
            const Held middle = convolved(node.cell[2 * i], x, x.map.c);
            const bool last = i == node.operations - 1;
            total = convolved(node.cell[2 * i + 1], middle, x.map.c, total.memory ? &total : nullptr, last);
        }
        return total;
    }

    void decode(Arrivals& arrivals, const Exit& exit) {
        std::vector<Arrival> running;
        for (int scale = net.scales - 1; scale >= 0; --scale) {
            std::vector<Arrival> incoming = arrivals[scale];
            incoming.insert(incoming.end(), running.begin(), running.end());
            const Held x = gathered(incoming, scale, channels(scale));
            arrivals[scale].clear();
            incoming.clear();
            running.clear();
            running = {{convolved(exit.merges[scale], x, channels(std::max(scale - 1, 0))), 1, true}};
        }
        const Held scores = convolved(exit.predictor, running[0].from, exit.predictor.outputs, nullptr, false, true);
        stem_map = {};
        enlarge(scores.map, net.classes, request.logits, request.image.height, request.image.width, threads);
    }

    const Network& net;
    const Request& request;
    Workspace& workspace;
    Arena arena;
    int threads;
    Clock clock;
    Held stem_map, pretrained;
};

// How a call from Python ended.
enum Status { DONE, NOT_FINITE, NO_MEMORY, FAILED };
thread_local char failure[256];  // what FAILED says, of this thread's last call

// `work` returns whether all values were finite.
template <class Work>
int guarded(const Work& work) {
    try {
        return work() ? DONE : NOT_FINITE;
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
    require(request.gates && request.logits, "there is no memory for the results");
    require(request.threads > 0, "there is no thread");
}

template <class T>
int forward(const Network* net, const Request* request, void* workspace) {
    return guarded([&] {
        check(*net, *request);
        return Forward<T>(*net, *request, *static_cast<Workspace*>(workspace)).run();
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
    FIELD(Network, classes), FIELD(Network, exits), FIELD(Network, stages),
    FIELD(Network, stem), FIELD(Network, nodes), FIELD(Network, exit), FIELD(Network, stage),
    STRUCTURE(Request), FIELD(Request, image), FIELD(Request, padded_height), FIELD(Request, padded_width),
    FIELD(Request, given), FIELD(Request, own), FIELD(Request, prices), FIELD(Request, gates), FIELD(Request, logits),
    FIELD(Request, seconds), FIELD(Request, threads),
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
        return guarded([&] { return normalized<T>(*image, *out, threads); });                                     \
    }

ENTRY_POINTS(float32, float)
#if defined(__AVX512BF16__)
ENTRY_POINTS(bfloat16, bfloat16)
#endif
#undef ENTRY_POINTS

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
