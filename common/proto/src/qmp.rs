//! QMP, the monitor protocol of QEMU and of its guest agent: <https://www.qemu.org/docs/master/interop/qmp-spec.html>.
