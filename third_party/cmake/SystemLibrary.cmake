# SPDX-License-Identifier: Apache-2.0
# A C library of the system, static where it can be: sets <name>_FOUND and makes the target <name>::<name>.
include_guard(GLOBAL)
include(FindPackageHandleStandardArgs)

function(tensorpager_find_system_library name)
  cmake_parse_arguments(PARSE_ARGV 1 arg "" "HEADER;LIBRARY;PACKAGES" "")
  find_path(${name}_INCLUDE_DIR ${arg_HEADER})
  find_library(${name}_LIBRARY NAMES lib${arg_LIBRARY}.a ${arg_LIBRARY})
  mark_as_advanced(${name}_INCLUDE_DIR ${name}_LIBRARY)
  find_package_handle_standard_args(
    ${name}
    REQUIRED_VARS ${name}_LIBRARY ${name}_INCLUDE_DIR
    REASON_FAILURE_MESSAGE "Install the system package ${arg_PACKAGES}, or let `make setup` do it.")
  set(${name}_FOUND ${${name}_FOUND} PARENT_SCOPE)
  if(NOT ${name}_FOUND OR TARGET ${name}::${name})
    return()
  endif()
  if(NOT ${name}_LIBRARY MATCHES "\\.a$")
    message(STATUS "${name}: no static library here, so the shared one is linked: ${${name}_LIBRARY}")
  endif()
  add_library(${name}::${name} UNKNOWN IMPORTED GLOBAL)
  set_target_properties(${name}::${name} PROPERTIES IMPORTED_LOCATION "${${name}_LIBRARY}"
                                                    INTERFACE_INCLUDE_DIRECTORIES "${${name}_INCLUDE_DIR}")
endfunction()
