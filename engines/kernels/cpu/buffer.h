// Memory that kernels read in whole cache lines.
#pragma once

#include <cstddef>
#include <new>
#include <vector>

namespace lathe {

// Vectors that start at a cache line.
template <class Element>
struct LineAllocator {
    using value_type = Element;
    static constexpr std::align_val_t kLine{64};

    LineAllocator() = default;
    template <class Other>
    LineAllocator(const LineAllocator<Other>&) {}

    Element* allocate(size_t count) {
        return static_cast<Element*>(::operator new(count * sizeof(Element), kLine));
    }
    void deallocate(Element* from, size_t) { ::operator delete(from, kLine); }
    bool operator==(const LineAllocator&) const { return true; }
};

template <class Element>
using Buffer = std::vector<Element, LineAllocator<Element>>;

// Grown, never shrunk: a step's buffers are those of the largest step so far.
template <class Element>
Element* grown(Buffer<Element>& buffer, size_t size) {
    if (buffer.size() < size) buffer.resize(size);
    return buffer.data();
}

}  // namespace lathe
