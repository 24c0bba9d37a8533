"""Where the build puts the native libraries (`libquota_cpu.so`); `quota.ops.native` loads them."""
