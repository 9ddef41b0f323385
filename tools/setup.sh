# Sourced by tools/quickstart and tools/test: a .venv with the tested versions, and the C++ library.
# Everything is skipped when it is up to date. Needs $root, the repository's root.

venv=$root/.venv

say() { printf '\033[1m%s\033[0m\n' "$*" >&2; }

die() {
  printf '%s\n' "$@" >&2
  exit 1
}

# The newest-tested Python that is new enough, on stdout.
find_python() {
  local name
  for name in python3 python3.13 python3.12 python3.11; do
    if command -v "$name" >/dev/null &&
      "$name" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
      command -v "$name"
      return
    fi
  done
}

# Stops with the one apt line that brings everything missing.
check_system() {
  local missing=() compiler=""
  python=$(find_python)
  if [ -z "$python" ]; then
    missing+=(python3 python3-venv)
  elif ! "$python" -c 'import venv, ensurepip' 2>/dev/null; then
    missing+=("python$("$python" -c 'import sys; print("%d.%d" % sys.version_info[:2])')-venv")
  fi
  for name in ${CXX:-} c++ g++ clang++; do
    command -v "$name" >/dev/null && compiler=$name
  done
  [ -n "$compiler" ] || missing+=(g++)
  [ ${#missing[@]} -eq 0 ] || die \
    "kttrio needs Python >= 3.11 with its venv module, and a C++ compiler. On Debian 12 or Ubuntu 24.04:" \
    "" "    sudo apt install ${missing[*]}" "" "then run this command again."
}

# One hash over the contents and names of the given files and folders.
hash_of() {
  (cd "$root" && { find "$@" -type f ! -path '*/__pycache__/*' -print0 2>/dev/null || true; } |
    sort -z | xargs -0 sha256sum | sha256sum | cut -c1-32)
}

# install_packages run|test: the packages, unless this very set stands in .venv already.
install_packages() {
  local wanted stamp=$venv/kttrio-$1.stamp extra=""
  wanted="$(hash_of pyproject.toml tools/constraints.txt) $root"
  # A Python that the system has since replaced leaves a link to nowhere.
  [ "$(cat "$stamp" 2>/dev/null)" = "$wanted" ] && [ -x "$venv/bin/python" ] && return
  check_system
  [ "$1" = test ] && extra="[test]"
  if ! grep -qsF -- " $venv" "$venv/pyvenv.cfg" || [ ! -x "$venv/bin/python" ]; then
    say "Creating .venv with $("$python" --version)"
    "$python" -m venv --clear "$venv"
  fi
  say "Installing the packages (the first time this takes a minute or two)"
  local pip=("$venv/bin/python" -m pip install -q --disable-pip-version-check)
  pip+=(-c "$root/tools/constraints.txt")
  "${pip[@]}" setuptools wheel cmake ninja
  "${pip[@]}" --no-build-isolation -e "$root$extra"
  echo "$wanted" | tee "$stamp" >"$venv/kttrio-run.stamp"
}

# The library, unless it was built from these very sources.
build_library() {
  local wanted stamp=$root/build/kttrio.stamp
  wanted="$(hash_of CMakeLists.txt cpp) $root"
  [ "$(cat "$stamp" 2>/dev/null)" = "$wanted" ] && [ -e "$root/build/libkttrio.so" ] && return
  check_system
  say "Building the C++ library"
  run_cmake build -DKTT_BUILD_TESTS=OFF
  echo "$wanted" >"$stamp"
}

# run_cmake FOLDER [options]: configure and build, with .venv's CMake and Ninja; loud only on failure.
run_cmake() {
  local folder=$root/$1 log fresh=()
  shift
  mkdir -p "$folder"
  log=$folder/kttrio-build.log
  # CMake refuses a folder configured by hand for another generator, or before the clone was moved.
  grep -qsxF "CMAKE_GENERATOR:INTERNAL=Ninja" "$folder/CMakeCache.txt" &&
    grep -qsxF "CMAKE_HOME_DIRECTORY:INTERNAL=$root" "$folder/CMakeCache.txt" || fresh=(--fresh)
  if ! {
    "$venv/bin/cmake" "${fresh[@]}" -S "$root" -B "$folder" -G Ninja -DCMAKE_MAKE_PROGRAM="$venv/bin/ninja" \
      -DCMAKE_BUILD_TYPE=Release "$@" && "$venv/bin/cmake" --build "$folder"
  } >"$log" 2>&1; then
    cat "$log" >&2
    die "The C++ build failed, see above."
  fi
}
