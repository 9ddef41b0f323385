# Reads the object files: kernel files export their table and nothing that the linker could share
# with others; code outside the AVX-512 and AMX files has no AVX-512; baseline code has no AVX.
set(AVX512 "%zmm|%[xy]mm(1[6-9]|2[0-9]|3[01])|%k[0-7]|%tmm")

foreach(object IN LISTS OBJECTS)
  get_filename_component(name ${object} NAME)
  execute_process(COMMAND ${NM} -C --defined-only --extern-only ${object}
    OUTPUT_VARIABLE symbols COMMAND_ERROR_IS_FATAL ANY)
  execute_process(COMMAND ${OBJDUMP} -d --no-show-raw-insn ${object}
    OUTPUT_VARIABLE code COMMAND_ERROR_IS_FATAL ANY)
  string(LENGTH "${code}" length)
  if(length LESS 1000)
    message(FATAL_ERROR "${name}: no code to look at")
  endif()
  if(name MATCHES "^table_")
    string(REGEX REPLACE "[^\n]* T ktt::table_[a-z0-9_]+\\(\\)\n" "" others "${symbols}")
    if(NOT others STREQUAL "")
      message(FATAL_ERROR "${name} exports more than its table:\n${others}")
    endif()
  elseif(code MATCHES "%ymm|%zmm")
    message(FATAL_ERROR "${name} is baseline code, but uses AVX registers")
  endif()
  if(NOT name MATCHES "^table_(avx512|amx)" AND code MATCHES "${AVX512}")
    message(FATAL_ERROR "${name} uses AVX-512: ${CMAKE_MATCH_0}")
  endif()
endforeach()
