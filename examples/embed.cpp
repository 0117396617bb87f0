// Embedding in C++17: owners that close themselves, errors as exceptions, text through a lambda.
//
//     c++ -O2 -std=c++17 examples/embed.cpp -o embed -lm -lpthread
//     ./embed MODEL.gguf "Once upon a time" "The capital of France is"
//
// The implementation is compiled right here, as C++. It may as well stand in a C file of its own:
// then leave out the #define and link that file.
#define MOE_INFER_IMPLEMENTATION
#include "../moe_infer.h"

#include <cstdint>
#include <exception>
#include <functional>
#include <iostream>
#include <memory>
#include <stdexcept>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

namespace moe {

struct error : std::runtime_error {
    moe_error detail;
    explicit error(const moe_error &e)
        : std::runtime_error(std::string(moe_status_name(e.status)) + ": " + e.text +
                             (e.where[0] ? std::string(" (") + e.where + ")" : std::string())),
          detail(e) {}
};

// A model may be shared by sessions in many threads; it must outlive them.
class model {
  public:
    explicit model(const std::string &path, const moe_model_options *options = nullptr) {
        moe_error e{};
        handle.reset(moe_model_open(path.c_str(), options, &e));
        if (!handle) throw error(e);
    }
    const moe_model *get() const { return handle.get(); }
    const moe_model_info &info() const { return *moe_model_get_info(get()); }

    std::vector<std::int32_t> tokenize(std::string_view text, unsigned flags) const {
        std::vector<std::int32_t> tokens(text.size() + 2); // enough in all but odd cases
        for (;;) {
            std::int64_t n = moe_vocab_tokenize(moe_model_vocab(get()), text.data(), text.size(),
                                                flags, tokens.data(), tokens.size());
            if (n < 0) throw std::runtime_error("cannot tokenize: has the model a vocabulary?");
            bool all = static_cast<std::size_t>(n) <= tokens.size();
            tokens.resize(static_cast<std::size_t>(n));
            if (all) return tokens;
        }
    }

  private:
    struct closer {
        void operator()(moe_model *m) const { moe_model_close(m); }
    };
    std::unique_ptr<moe_model, closer> handle;
};

// One conversation. Not for two threads at a time.
class session {
  public:
    // Gets pieces of valid UTF-8; returns false to stop. May throw: generate() throws it on.
    using sink = std::function<bool(std::string_view)>;

    explicit session(const model &m, const moe_session_options *options = nullptr) : owner(&m) {
        moe_error e{};
        handle.reset(moe_session_open(m.get(), options, &e));
        if (!handle) throw error(e);
    }

    moe_generate_result generate(std::string_view prompt, int max_tokens, sink on_text) {
        call state{std::move(on_text), nullptr};
        std::vector<std::int32_t> tokens = owner->tokenize(prompt, MOE_TOKENIZE_ADD_SPECIAL);
        moe_generate_options options{};
        options.max_tokens = max_tokens;
        options.on_text = forward;
        options.user = &state;
        moe_generate_result result{};
        moe_error e{};
        if (moe_generate(handle.get(), tokens.data(), static_cast<std::int32_t>(tokens.size()),
                         &options, &result, &e) != MOE_OK)
            throw error(e);
        if (state.thrown) std::rethrow_exception(state.thrown);
        return result;
    }

    // Forgets everything; the memory stays.
    void clear() { moe_session_rewind(handle.get(), 0, nullptr); }

  private:
    struct call {
        sink on_text;
        std::exception_ptr thrown;
    };
    // An exception must not cross the library's frames: it is kept here and thrown on later.
    static int forward(void *user, const char *text, std::size_t size) {
        call &state = *static_cast<call *>(user);
        try {
            return state.on_text(std::string_view(text, size)) ? 1 : 0;
        } catch (...) {
            state.thrown = std::current_exception();
            return 0;
        }
    }
    struct closer {
        void operator()(moe_session *s) const { moe_session_close(s); }
    };
    const model *owner;
    std::unique_ptr<moe_session, closer> handle;
};

} // namespace moe

int main(int argc, char **argv) {
    if (argc < 3) {
        std::cerr << "usage: " << argv[0] << " MODEL.gguf PROMPT...\n";
        return 2;
    }
    try {
        moe::model model(argv[1]);
        moe::session session(model);
        for (int i = 2; i < argc; i++) {
            session.clear();
            std::string text;
            auto result = session.generate(argv[i], 60, [&](std::string_view piece) {
                text += piece;
                std::cout << piece << std::flush;
                return text.size() < 500 && std::cout.good(); // enough said
            });
            if (!(std::cout << '\n' << std::flush)) throw std::runtime_error("cannot write");
            std::cerr << "[" << result.n_generated << " tokens, "
                      << result.n_generated / (result.generate_seconds + 1e-9) << " per second]\n";
        }
    } catch (const std::exception &e) {
        std::cerr << "embed: " << e.what() << '\n';
        return 1;
    }
}
