// From the text of PTX to a Program.
//
// Source: Parallel Thread Execution ISA, chapters 4 (syntax) and 9 (instructions).
#include <algorithm>
#include <bit>
#include <cstdlib>
#include <regex>
#include <set>
#include <tuple>
#include <unordered_map>

#include "program.h"

namespace ptx {
namespace {

using Words = std::vector<std::string>;

[[noreturn]] void unknown(const std::string& what) {
  throw Failure("unknown " + what);
}

std::string without_comments(std::string text) {
  for (size_t at = 0; (at = text.find("//", at)) != std::string::npos;) {
    while (at < text.size() && text[at] != '\n') text[at++] = ' ';
  }
  return text;
}

std::string trimmed(const std::string& text) {
  const size_t first = text.find_first_not_of(" \t\n{}"), last = text.find_last_not_of(" \t\n{}");
  return first == std::string::npos ? "" : text.substr(first, last - first + 1);
}

bool is_name(char c) {
  return std::isalnum(static_cast<unsigned char>(c)) || c == '_' || c == '$' || c == '%' ||
         c == '.';
}

// the text before the first white space, and the text behind it
std::pair<std::string, std::string> first_word(const std::string& text) {
  const size_t end = std::min(text.find_first_of(" \t\n"), text.size());
  const size_t next = std::min(text.find_first_not_of(" \t\n", end), text.size());
  return {text.substr(0, end), text.substr(next)};
}

// at commas outside of brackets
Words split(const std::string& text, char separator = ',') {
  Words parts;
  int depth = 0;
  size_t start = 0;
  for (size_t i = 0; i <= text.size(); ++i) {
    const char c = i < text.size() ? text[i] : separator;
    depth += (c == '{' || c == '[') - (c == '}' || c == ']');
    if (c != separator || depth > 0) continue;
    const size_t first = text.find_first_not_of(" \t\n", start);
    if (first < i) {
      const size_t last = text.find_last_not_of(" \t\n", i - 1);
      parts.push_back(text.substr(first, last - first + 1));
    }
    start = i + 1;
  }
  return parts;
}

bool has(const Words& words, const std::string& word) {
  return std::find(words.begin(), words.end(), word) != words.end();
}

size_t rounded_up(size_t value, size_t to) {
  return (value + to - 1) / to * to;
}

uint64_t literal(const std::string& text) {
  if (text.starts_with("0f") || text.starts_with("0F") || text.starts_with("0d") ||
      text.starts_with("0D")) {
    return std::strtoull(text.c_str() + 2, nullptr, 16);
  }
  char* end = nullptr;
  if (text.find('.') != std::string::npos) {
    const uint64_t bits = std::bit_cast<uint64_t>(std::strtod(text.c_str(), &end));
    if (*end == 0) return bits;
  }
  const uint64_t value = text.starts_with("-") ? -std::strtoull(text.c_str() + 1, &end, 0)
                                               : std::strtoull(text.c_str(), &end, 0);
  if (text.empty() || end == text.c_str() || (*end != 0 && std::string(end) != "U")) {
    unknown("operand " + text);
  }
  return value;
}

int bits_of(const std::string& type) {  // of "f32", "u8", "b64"
  const size_t digits = type.find_first_of("0123456789");
  if (digits == std::string::npos) unknown("type " + type);
  return std::atoi(type.c_str() + digits);
}

class Parser {
 public:
  Parser(const std::string& name, const Entry& entry) {
    program_.name = name;
    lay_out_parameters(entry.parameters);
    lay_out_shared(entry.module + entry.body, entry.body);
    std::smatch limit;
    if (std::regex_search(entry.directives, limit,
                          std::regex(R"(\.(?:maxntid|reqntid)\s+(\d+)(?:\s*,\s*(\d+))?)"))) {
      program_.max_threads = std::stoi(limit[1]) * (limit[2].matched ? std::stoi(limit[2]) : 1);
    }
    statements(entry.body, entry.line);
    program_.code.emplace_back();
    program_.code.back().kind = Kind::kExit;  // running past the end is one
    program_.code.back().pipe = Pipe::kControl;
    program_.code.back().name = "end";
    for (Instruction& in : program_.code) {
      if (in.kind == Kind::kBranch) in.constant[0] = labels_.at(targets_[in.constant[0]]);
    }
  }

  Program take() { return std::move(program_); }

 private:
  struct Scope {
    std::unordered_map<std::string, int> width, place;
    std::vector<std::pair<std::string, int>> families;  // %r<100>
  };

  // ---- declarations ----

  void lay_out_parameters(const std::string& text) {
    size_t at = 0;
    for (const std::string& parameter : split(text)) {
      std::smatch m;
      if (!std::regex_search(parameter, m,
                             std::regex(R"(\.([busf]\d+)\s.*?([\w$]+)(?:\[(\d+)\])?\s*$)"))) {
        unknown("parameter " + parameter);
      }
      const size_t size = bits_of(m[1]) / 8, count = m[3].matched ? std::stoul(m[3]) : 1;
      size_t alignment = size;
      std::smatch aligned;  // .ptr .align speaks of what is pointed to
      if (parameter.find(".ptr") == std::string::npos &&
          std::regex_search(parameter, aligned, std::regex(R"(\.align\s+(\d+))"))) {
        alignment = std::stoul(aligned[1]);
      }
      at = rounded_up(at, alignment);
      parameter_at_[m[2]] = at;
      program_.parameters.push_back({at, size * count});
      at += size * count;
    }
    program_.parameter_bytes = at;
  }

  void lay_out_shared(const std::string& text, const std::string& body) {
    static const std::regex variable(
        R"((\.extern\s+)?\.shared\s+(?:\.align\s+(\d+)\s+)?\.[bus](\d+)\s+([\w$]+)(?:\[(\d*)\])?\s*$)");
    std::vector<std::smatch> found;
    const Words declarations = split(text, ';');
    for (const std::string& declaration : declarations) {
      std::smatch m;
      if (declaration.find(".shared") != std::string::npos &&
          std::regex_search(declaration, m, variable) &&
          body.find(m[4].str()) != std::string::npos) {
        found.push_back(m);
      }
    }
    for (const bool external : {false, true}) {
      for (const std::smatch& m : found) {
        if (m[1].matched != external) continue;
        const size_t element = std::stoul(m[3]) / 8;
        const size_t at =
            rounded_up(program_.static_shared, m[2].matched ? std::stoul(m[2]) : element);
        shared_at_[m[4]] = static_cast<uint32_t>(kSharedStart + at);
        if (external) {
          program_.dynamic_shared_at = at;
        } else {
          const bool array = m[5].matched && m[5].length() > 0;
          program_.static_shared = at + element * (array ? std::stoul(m[5]) : 1);
          program_.dynamic_shared_at = program_.static_shared;
        }
      }
    }
  }

  void declare_registers(const std::string& text) {
    const size_t space = text.find_first_of(" \t", 5);
    const std::string type = text.substr(text.find('.', 4) + 1, space - text.find('.', 4) - 1);
    const int width = type == "pred" ? 1 : bits_of(type) == 64 ? 64 : 32;
    for (const std::string& name : split(text.substr(space))) {
      const size_t angle = name.find('<');
      if (angle == std::string::npos) {
        scopes_.back().width[name] = width;
      } else {
        scopes_.back().families.emplace_back(name.substr(0, angle), width);
      }
    }
  }

  void statements(const std::string& body, int line) {
    scopes_.emplace_back();
    for (size_t at = 0;;) {
      while (at < body.size() && std::isspace(static_cast<unsigned char>(body[at]))) {
        line += body[at++] == '\n';
      }
      if (at >= body.size()) return;
      size_t word = at;
      while (word < body.size() && is_name(body[word])) ++word;
      if (body[at] == '{') {
        scopes_.emplace_back();
        ++at;
      } else if (body[at] == '}') {
        scopes_.pop_back();
        ++at;
      } else if (body.compare(at, 4, ".loc") == 0 || body.compare(at, 5, ".file") == 0) {
        at = std::min(body.find('\n', at), body.size());
      } else if (word > at && body[word] == ':' && body[word + 1] != ':') {
        labels_[body.substr(at, word - at)] = static_cast<int>(program_.code.size());
        at = word + 1;
      } else {
        const size_t end = body.find(';', at);
        if (end == std::string::npos) unknown("text at the end: " + body.substr(at, 80));
        const std::string text = body.substr(at, end - at);
        try {
          statement(text, line);
        } catch (const std::exception& error) {
          throw Failure(program_.name + " line " + std::to_string(line) + ": " + error.what() +
                        ": " + text);
        }
        line += static_cast<int>(std::count(text.begin(), text.end(), '\n'));
        at = end + 1;
      }
    }
  }

  // ---- operands ----

  int new_place(int width) {
    const int place = static_cast<int>(program_.register_bytes);
    program_.register_bytes += width == 1 ? 64 : width == 32 ? 128 : 256;
    width_of_place_[place] = width;
    return place;
  }

  int find_register(const std::string& name) {  // -1: none of that name
    const size_t digits = name.find_last_not_of("0123456789") + 1;
    for (auto scope = scopes_.rbegin(); scope != scopes_.rend(); ++scope) {
      if (const auto found = scope->place.find(name); found != scope->place.end()) {
        return found->second;
      }
      int width = 0;
      if (const auto found = scope->width.find(name); found != scope->width.end()) {
        width = found->second;
      }
      for (const auto& [prefix, family_width] : scope->families) {
        if (digits < name.size() && name.compare(0, digits, prefix) == 0 &&
            prefix.size() == digits) {
          width = family_width;
        }
      }
      if (width != 0) return scope->place[name] = new_place(width);
    }
    return -1;
  }

  int target(const std::string& name) {
    if (name == "_") return -1;
    const int place = find_register(name);
    if (place < 0) unknown("register " + name);
    return place;
  }

  int constant(uint64_t value, int width) {
    if (width != 64) value &= 0xffffffffu;
    auto [found, is_new] = constant_at_.try_emplace({value, width}, 0);
    if (is_new) {
      found->second = new_place(width);
      program_.constants.push_back({found->second, width, value});
    }
    return found->second;
  }

  int source(const std::string& text, int width = 32) {
    if (const int place = find_register(text); place >= 0) return place;
    if (text[0] == '%') return special(text);
    if (text == "WARP_SZ") return constant(32, width);
    if (const auto at = shared_at_.find(text); at != shared_at_.end()) {
      return constant(at->second, width);
    }
    if (const auto at = parameter_at_.find(text); at != parameter_at_.end()) {
      return constant(at->second, width);  // an address in the space of parameters
    }
    return constant(literal(text), width);
  }

  int special(const std::string& text) {
    static const std::map<std::string, Special> kinds = {
        {"%tid", Special::kThread},    {"%ctaid", Special::kBlock}, {"%ntid", Special::kThreads},
        {"%nctaid", Special::kBlocks}, {"%laneid", Special::kLane}, {"%warpid", Special::kWarp}};
    const size_t dot = text.find('.');
    const auto kind = kinds.find(text.substr(0, dot));
    if (kind == kinds.end()) unknown("special register " + text);
    auto [found, is_new] = special_at_.try_emplace(text, 0);
    if (is_new) {
      found->second = new_place(32);
      const int axis = dot == std::string::npos ? 0 : text.back() - 'x';
      program_.specials.push_back({found->second, kind->second, axis});
    }
    return found->second;
  }

  // [base+offset]: place of the base, or -1 for a parameter, and the offset
  std::pair<int, int64_t> address(const std::string& text, int width) {
    if (text.front() != '[' || text.back() != ']') unknown("address " + text);
    const Words terms = split(text.substr(1, text.size() - 2), '+');
    if (terms.empty() || terms.size() > 2) unknown("address " + text);
    const int64_t offset = terms.size() == 2 ? static_cast<int64_t>(literal(terms[1])) : 0;
    if (const auto at = parameter_at_.find(terms[0]); at != parameter_at_.end()) {
      return {-1, static_cast<int64_t>(at->second) + offset};
    }
    return {source(terms[0], width), offset};
  }

  // ---- instructions ----

  void statement(const std::string& text, int line) {
    if (text.starts_with(".reg")) return declare_registers(text);
    if (text[0] == '.') {
      for (const char* harmless : {".shared", ".pragma", ".loc", ".file"}) {
        if (text.starts_with(harmless)) return;
      }
      unknown("directive");
    }
    Instruction in;
    in.line = line;
    std::string rest = text;
    if (rest[0] == '@') {
      in.negated = rest[1] == '!';
      const auto [guard, guarded] = first_word(rest.substr(in.negated ? 2 : 1));
      in.guard = target(guard);
      rest = guarded;
    }
    std::tie(in.name, rest) = first_word(rest);
    translate(in, split(in.name, '.'), split(rest));
    program_.code.push_back(in);
  }

  void use(Instruction& in, const std::string& name) {
    const Known* known = find_instruction(name);
    if (known == nullptr) unknown("instruction " + in.name);
    in.execute = known->execute;
    in.kind = known->kind;
    in.pipe = known->pipe;
  }

  void translate(Instruction& in, const Words& words, const Words& parts) {
    const std::string& head = words[0];
    if (head == "ret" || head == "exit") return use(in, "exit");
    if (head == "bra") {
      use(in, "bra");
      in.constant[0] = static_cast<int64_t>(targets_.size());
      targets_.push_back(parts.at(0));
      return;
    }
    if (head == "ld" || head == "st") return memory(in, words, parts);
    if (head == "cp") return copy(in, words, parts);
    if (head == "bar" || head == "barrier") return barrier(in, words, parts);
    if (head == "ldmatrix") return load_matrices(in, words, parts);
    if (head == "mma") return multiply(in, parts);
    if (head == "shfl") return shuffle(in, words, parts);
    if (head == "mov" && (parts.at(0)[0] == '{' || parts.at(1)[0] == '{')) {
      return move_parts(in, words, parts);
    }
    if (head == "cvta") {
      use(in, "mov.b64");
      in.operand = {target(parts.at(0)), source(parts.at(1), 64)};
      return;
    }
    if (head == "lop3") {
      use(in, "lop3.b32");
      for (int i = 0; i < 4; ++i) in.operand[i] = i ? source(parts.at(i)) : target(parts.at(0));
      in.constant[0] = static_cast<int64_t>(literal(parts.at(4)));
      return;
    }
    if (head == "redux") {
      use(in, in.name);
      in.operand = {target(parts.at(0)), source(parts.at(1))};
      in.members = source(parts.at(2));
      return;
    }
    plain(in, words, parts);
  }

  // by the operands that the table says
  void plain(Instruction& in, const Words& words, const Words& parts) {
    // arithmetic here rounds to nearest even, and what is uniform is not needed to be
    static const std::set<std::string> implied = {"rn", "uni", "volatile"};
    std::string name;
    for (const std::string& word : words) {
      if (!implied.contains(word)) name += (name.empty() ? "" : ".") + word;
    }
    use(in, name);
    const std::string& operands = find_instruction(name)->operands;
    if (operands.size() != parts.size()) unknown("number of operands of " + in.name);
    for (size_t i = 0; i < parts.size(); ++i) {
      const int width = operands[i] == 'p' ? 1 : operands[i] == 'd' ? 64 : 32;
      in.operand[i] = i == 0 ? target(parts[i]) : source(parts[i], width);
      if (width_of_place_[in.operand[i]] != width) unknown("width of operand " + parts[i]);
    }
  }

  // operand: values, base; constant: bytes of a value, signed, values, offset, 64-bit registers
  void memory(Instruction& in, const Words& words, const Words& parts) {
    std::string space;
    int vector = 1;
    for (const std::string& word : words) {
      const std::string base = word.substr(0, word.find("::"));
      if (base == "param" || base == "shared" || base == "global") space = base;
      if (word.size() == 2 && word[0] == 'v') vector = word[1] - '0';
    }
    if (space.empty()) unknown("address space of " + in.name);
    const bool stores = words[0] == "st";
    const std::string& type = words.back();
    use(in, words[0] + "." + space);
    const auto [base, offset] = address(parts.at(stores ? 0 : 1), space == "shared" ? 32 : 64);
    const Words values = split(trimmed(parts.at(stores ? 1 : 0)));
    if (static_cast<int>(values.size()) != vector || vector > 8) unknown("vector of " + in.name);
    bool wide = false;
    for (int i = 0; i < vector; ++i) {
      in.operand[i] =
          stores ? source(values[i], bits_of(type) == 64 ? 64 : 32) : target(values[i]);
      wide |= in.operand[i] >= 0 && width_of_place_[in.operand[i]] == 64;
    }
    in.operand[vector] = base;
    in.constant = {bits_of(type) / 8, type[0] == 's', vector, offset, wide};
  }

  // operand: to, from[, bytes that are read]; constant: bytes, offsets, whether some are not read
  void copy(Instruction& in, const Words& words, const Words& parts) {
    if (words.at(1) != "async") unknown("instruction " + in.name);
    if (words.at(2) == "commit_group" || words[2] == "wait_all") return use(in, in.name);
    if (words[2] == "wait_group") {
      use(in, in.name);
      in.constant[0] = static_cast<int64_t>(literal(parts.at(0)));
      return;
    }
    use(in, "cp.async");
    const auto [to, to_offset] = address(parts.at(0), 32);
    const auto [from, from_offset] = address(parts.at(1), 64);
    const int64_t bytes = static_cast<int64_t>(literal(parts.at(2)));
    const bool hint = has(words, "L2::cache_hint");  // the last operand, of no consequence here
    const bool partial = parts.size() - hint == 4;
    if (words[2] == "cg" ? bytes != 16 : bytes != 4 && bytes != 8 && bytes != 16) {
      unknown("size of " + in.name);
    }
    in.operand = {to, from, partial ? source(parts[3]) : -1};
    in.constant = {bytes, to_offset, from_offset, partial};
  }

  // operand: id, threads, where they are registers (-1: constants; threads -2: all)
  void barrier(Instruction& in, const Words& words, const Words& parts) {
    if (words.at(1) == "warp") {
      use(in, "bar.warp.sync");
      in.members = source(parts.at(0));
      return;
    }
    if (!has(words, "sync")) unknown("instruction " + in.name);
    use(in, "bar.sync");
    in.operand = {-1, -2};
    for (size_t i = 0; i < parts.size(); ++i) {
      in.operand[i] = find_register(parts[i]);
      if (in.operand[i] < 0) in.constant[i] = static_cast<int64_t>(literal(parts[i]));
    }
  }

  void load_matrices(Instruction& in, const Words& words, const Words& parts) {
    if (!has(words, "m8n8") || words.back() != "b16") unknown("instruction " + in.name);
    use(in, "ldmatrix");
    const Words values = split(trimmed(parts.at(0)));
    const auto [base, offset] = address(parts.at(1), 32);
    for (size_t i = 0; i < values.size(); ++i) in.operand[i] = target(values[i]);
    in.operand[values.size()] = base;
    in.constant = {static_cast<int64_t>(values.size()), has(words, "trans"), offset};
  }

  // operand: d 4, a, b, c 4
  void multiply(Instruction& in, const Words& parts) {
    std::string name = in.name;
    for (const char* word : {".sync", ".aligned", ".row.col"}) {
      if (const size_t at = name.find(word); at != std::string::npos) {
        name.erase(at, std::string(word).size());
      }
    }
    use(in, name);
    int count = 0;
    for (size_t i = 0; i < parts.size(); ++i) {
      for (const std::string& value : split(trimmed(parts[i]))) {
        in.operand.at(count++) = i == 0 ? target(value) : source(value);
      }
    }
  }

  // operand: d, predicate or -1, a, b, c; constant: mode
  void shuffle(Instruction& in, const Words& words, const Words& parts) {
    static const Words modes = {"bfly", "idx", "up", "down"};
    use(in, "shfl.sync");
    const Words written = split(parts.at(0), '|');
    in.operand = {target(written[0]), written.size() > 1 ? target(written[1]) : -1,
                  source(parts.at(1)), source(parts.at(2)), source(parts.at(3))};
    in.members = source(parts.at(4));
    const auto mode = std::find(modes.begin(), modes.end(), words.at(2));
    if (mode == modes.end() || words.back() != "b32") unknown("instruction " + in.name);
    in.constant[0] = mode - modes.begin();
  }

  // mov.b32 {low,high},whole and mov.b32 whole,{low,high}
  void move_parts(Instruction& in, const Words& words, const Words& parts) {
    const int bits = bits_of(words.back());
    const bool splits = parts.at(0)[0] == '{';
    const Words pieces = split(trimmed(parts[splits ? 0 : 1]));
    const int count = static_cast<int>(pieces.size());
    use(in, std::string(splits ? "split." : "join.") + std::to_string(count) + "x" +
                std::to_string(bits / count));
    for (int i = 0; i < count; ++i) {
      in.operand[i] = splits ? target(pieces[i]) : source(pieces[i]);
    }
    in.operand[count] = splits ? source(parts[1], bits) : target(parts[0]);
  }

  Program program_;
  std::vector<Scope> scopes_;
  std::map<std::string, int> labels_;
  Words targets_;  // labels of the branches, by their constant
  std::unordered_map<std::string, size_t> shared_at_, parameter_at_;
  std::map<std::pair<uint64_t, int>, int> constant_at_;
  std::map<std::string, int> special_at_;
  std::unordered_map<int, int> width_of_place_;
};

}  // namespace

std::map<std::string, Entry> find_entries(const std::string& commented) {
  const std::string text = without_comments(commented);
  std::map<std::string, Entry> entries;
  std::string module;
  size_t outside = 0;
  for (size_t at = 0; (at = text.find(".entry", at)) != std::string::npos;) {
    module += text.substr(outside, at - outside);
    const size_t open = text.find('(', at), closed = text.find(')', open);
    const size_t begin = text.find('{', closed);
    if (begin == std::string::npos) unknown("form of an entry");
    size_t end = begin;
    int depth = 0;
    do {
      depth += (text[end] == '{') - (text[end] == '}');
      ++end;
    } while (depth > 0 && end < text.size());
    const size_t name = text.find_first_not_of(" \t\n", at + 6);
    Entry entry;
    entry.parameters = text.substr(open + 1, closed - open - 1);
    entry.directives = text.substr(closed + 1, begin - closed - 1);
    entry.body = text.substr(begin + 1, end - begin - 2);
    entry.line = 1 + static_cast<int>(std::count(text.begin(), text.begin() + begin, '\n'));
    entries[text.substr(name, text.find_first_of(" \t\n(", name) - name)] = entry;
    at = outside = end;
  }
  module += text.substr(outside);
  for (auto& [name, entry] : entries) entry.module = module;
  return entries;
}

Program parse(const std::string& name, const Entry& entry) {
  return Parser(name, entry).take();
}

}  // namespace ptx
