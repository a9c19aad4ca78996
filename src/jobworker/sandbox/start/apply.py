"""Applies the steps of a plan in the process that becomes a job: one function a kind of step.

This code runs between clone3(2) and execve(2), in a process that must not return. It makes plain
system calls, buffers nothing and imports nothing. The first step that fails raises `StepFailed`
with the step's name and the kernel's reason. The caller reports it and the process ends; the kernel
removes its namespaces and mounts with it.

Standard library only.
"""

import errno
import fcntl
import os
import resource
import signal
import socket
from collections.abc import Callable, Iterable
from typing import NamedTuple

from jobworker.sandbox import capabilities, channel
from jobworker.sandbox import syscalls as sc
from jobworker.sandbox.cgroup.hierarchy import JobScope
from jobworker.sandbox.disk.images import ImageSettings
from jobworker.sandbox.seccomp import program as bpf
from jobworker.sandbox.start import network, private_network, root_mounts
from jobworker.sandbox.start import steps as s

STATUS_DESCRIPTOR, ORDER_DESCRIPTOR = 3, 4
"""The descriptors by which the trampoline has its socket to the launcher, and its order."""
TRAMPOLINE_DESCRIPTOR, USER_NAMESPACE_DESCRIPTOR = 5, 6
REPORT_DESCRIPTOR, INIT_DESCRIPTOR = 7, 8
"""Descriptors that the child needs until it executes the trampoline or the init; close-on-exec. It
has the last two only if the job has an init."""
_REPORT_OF_INIT = 6

_PRIVATE = sc.MS_NOSUID | sc.MS_NODEV
_SIGNALS = 64


class StepFailed(Exception):
    """A step that failed: its name, the errno (0 if there is none) and the path or the reason."""

    def __init__(self, step: str, code: int, detail: str) -> None:
        super().__init__(step, code, detail)
        self.step, self.code, self.detail = step, code, detail


class StepContext(NamedTuple):
    """The job's scope and the descriptors that steps need besides their own fields."""

    scope: JobScope
    stdout: int
    stderr: int
    status: int
    """The child's end of its socket to the launcher."""
    order: int
    """A memfd that the launcher writes the order into."""
    trampoline: int
    """The trampoline's program: `trampoline.open_program`."""
    user_namespace: int
    """The user namespace that maps root to the job's range of ids."""
    filters: bpf.Filters
    landlock: int | None
    """The ruleset of `sandbox.start.landlock`; None if the kernel cannot scope."""
    image_settings: ImageSettings | None
    """The settings for the job's disk; None for a job without one."""
    gateway_handle: private_network.GatewayHandle | None = None
    """The job's private network, if it has one. Its descriptors are closed before the job runs."""
    init: int = -1
    """The program of the init: `init_program.open_init`; -1 for a job without one."""
    report: int = -1
    """The write end of the pipe for the init's report; -1 for a job without an init."""


def apply(steps: Iterable[s.Step], context: StepContext) -> None:
    """Apply `steps` in order. Raises StepFailed for the first one that fails.

    Does not return if the last step is `BecomeTrampoline` or `BecomeInit`.
    """
    for step in steps:
        try:
            _APPLY[type(step)](step, context)
        except OSError as error:
            detail = str(error.filename or "") or _subject(step)
            raise StepFailed(s.name_of(step), error.errno or 0, detail) from error


def _subject(step: s.Step) -> str:
    return next((value for value in step if isinstance(value, str)), "")


def _attach_scope(_: s.AttachScope, context: StepContext) -> None:
    context.scope.attach_self()


def _scope_sockets_and_signals(_: s.ScopeSocketsAndSignals, context: StepContext) -> None:
    if context.landlock is not None:
        sc.landlock_restrict_self(context.landlock)


def _keep_own_descriptors(step: s.KeepOwnDescriptors, context: StepContext) -> None:
    # Move all of them to high numbers first: one may have the number that another one must get.
    null = os.open(step.stdin, os.O_RDONLY | os.O_CLOEXEC)
    streams = (null, context.stdout, context.stderr, context.status)
    own = [*streams, context.order, context.trampoline, context.user_namespace]
    if context.init >= 0:
        own += [context.report, context.init]
    away = [fcntl.fcntl(descriptor, fcntl.F_DUPFD_CLOEXEC, 16) for descriptor in own]
    for number, descriptor in enumerate(away):
        os.dup2(descriptor, number, inheritable=number <= 2)
    sc.close_range(len(own))


def _unshare_cgroup_namespace(_: s.UnshareCgroupNamespace, __: StepContext) -> None:
    sc.unshare(sc.CLONE_NEWCGROUP)


def _new_session(_: s.NewSession, __: StepContext) -> None:
    os.setsid()


def _new_keyring(_: s.NewKeyring, __: StepContext) -> None:
    sc.join_new_session_keyring()


def _mount_tmpfs(step: s.MountTmpfs, _: StepContext) -> None:
    options = f"mode={step.mode:o},size={step.size_bytes},uid={step.owner},gid={step.owner}"
    sc.mount("tmpfs", step.path, "tmpfs", _PRIVATE, options)


def _map_ids(step: s.MapIds, _: StepContext) -> None:
    root_mounts.map_ids(step, USER_NAMESPACE_DESCRIPTOR)


def _mount_disk(step: s.MountDisk, context: StepContext) -> None:
    assert context.image_settings is not None, "only a root of layers has a disk"
    disk = root_mounts.mount_disk(step, context.image_settings)
    # With these the launcher keeps the disk mounted until it discards it.
    _hand_over({"disk": True}, *disk)


def _hand_over(message: channel.Message, *descriptors: int) -> None:
    """Send descriptors to the launcher with `message`, and close them in this process."""
    with socket.socket(fileno=os.dup(STATUS_DESCRIPTOR)) as status:
        channel.send(status, message, descriptors)
    channel.close_all(descriptors)


def _mount_overlay(step: s.MountOverlay, _: StepContext) -> None:
    root_mounts.mount_overlay(step)
    if step.path == s.ROOT:  # the launcher calls syncfs(2) on it at the end, see `lost_writes`
        root = os.open(step.path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        _hand_over({"root": True}, root)


def _mount_devices(step: s.MountDevices, _: StepContext) -> None:
    root_mounts.mount_devices(step)
    null = os.open(f"{step.path}/null", os.O_RDONLY | os.O_CLOEXEC)
    os.dup2(null, 0)  # from here on standard input is the job's own /dev/null
    os.close(null)


def _open_volume(step: s.OpenVolume, _: StepContext) -> None:
    root, thin = root_mounts.open_volume(step, USER_NAMESPACE_DESCRIPTOR)
    _hand_over({"volume": step.name, "thin": thin}, root)


def _place_volume(step: s.PlaceVolume, _: StepContext) -> None:
    root_mounts.place_volume(step)


def _make_scratch(step: s.MakeScratch, _: StepContext) -> None:
    root_mounts.make_scratch(step)


def _bind_scratch(step: s.BindScratch, _: StepContext) -> None:
    sc.mount(step.source, step.path, None, sc.MS_BIND)


def _mount_devpts(step: s.MountDevpts, _: StepContext) -> None:
    options = f"newinstance,ptmxmode=0666,mode=620,gid={step.tty_group},max={step.most}"
    sc.mount("devpts", step.path, "devpts", sc.MS_NOSUID | sc.MS_NOEXEC, options)


def _mount_proc(step: s.MountProc, _: StepContext) -> None:
    sc.mount("proc", step.path, "proc", _PRIVATE | sc.MS_NOEXEC)


def _mask_path(step: s.MaskPath, _: StepContext) -> None:
    if os.path.isdir(step.path):
        options = "mode=555,size=4k,nr_inodes=2"
        sc.mount("tmpfs", step.path, "tmpfs", _PRIVATE | sc.MS_NOEXEC | sc.MS_RDONLY, options)
    elif os.path.lexists(step.path):
        root = step.path[: step.path.index("/proc/")]
        sc.mount(f"{root}/dev/null", step.path, None, sc.MS_BIND)


def _read_only_path(step: s.ReadOnlyPath, _: StepContext) -> None:
    if not os.path.lexists(step.path):
        return
    sc.mount(step.path, step.path, None, sc.MS_BIND | sc.MS_REC)
    flags = sc.MS_REMOUNT | sc.MS_BIND | sc.MS_RDONLY | _PRIVATE | sc.MS_NOEXEC
    sc.mount(None, step.path, None, flags)


def _pivot_root(step: s.PivotRoot, _: StepContext) -> None:
    # pivot_root(2), "pivot_root(".", ".")": the new root needs to be a mount point, which the
    # jobs' tree is, and the old one is detached from under it without a directory for it.
    os.chdir(step.path)
    sc.pivot_root(".", ".")
    sc.umount(".")
    os.chdir("/")


def _unshare_network(step: s.UnshareNetwork, _: StepContext) -> None:
    network.unshare_network(range(step.first_gid, step.first_gid + step.ids))


def _enter_network(step: s.EnterNetwork, context: StepContext) -> None:
    assert context.gateway_handle is not None, "a network with a gateway has a way to it"
    private_network.enter(context.gateway_handle, range(step.first_gid, step.first_gid + step.ids))


def _write_names(step: s.WriteNames, _: StepContext) -> None:
    network.write_names(step.files)


def _set_resource_limit(step: s.SetResourceLimit, _: StepContext) -> None:
    number = getattr(resource, step.resource)
    # Never raise a hard limit above the launcher's own: that is the administrator's bound, such as
    # LimitNOFILE= of the unit.
    ceiling = resource.getrlimit(number)[1]
    hard = step.hard if ceiling == resource.RLIM_INFINITY else min(step.hard, ceiling)
    resource.setrlimit(number, (min(step.soft, hard), hard))


def _set_oom_score(step: s.SetOomScore, _: StepContext) -> None:
    with open("/proc/self/oom_score_adj", "r+", encoding="ascii") as file:
        if int(file.read()) < step.value:  # only a process with CAP_SYS_RESOURCE may lower it
            file.write(str(step.value))


def _enter_user_namespace(step: s.EnterUserNamespace, _: StepContext) -> None:
    sc.setns(USER_NAMESPACE_DESCRIPTOR, sc.CLONE_NEWUSER)
    if step.leave_groups:
        os.setgroups([])
    os.setresgid(0, 0, 0)
    os.setresuid(0, 0, 0)


def _drop_capabilities(step: s.DropCapabilities, _: StepContext) -> None:
    sc.prctl(sc.PR_CAP_AMBIENT, sc.PR_CAP_AMBIENT_CLEAR_ALL)
    for number in range(capabilities.LAST + 1):
        if number in step.keep:
            continue
        try:
            sc.prctl(sc.PR_CAPBSET_DROP, number)
        except OSError as error:
            if error.errno != errno.EINVAL:  # EINVAL: this kernel has no further capabilities
                raise
            break
    sc.capset(step.keep)


def _set_user(step: s.SetUser, _: StepContext) -> None:
    for path in step.directories:
        os.chown(path, step.uid, step.gid)
    os.setresgid(step.gid, step.gid, step.gid)
    os.setresuid(step.uid, step.uid, step.uid)
    if step.uid:
        sc.capset(frozenset())  # setresuid(2) leaves the inheritable set as it is


def _forbid_new_privileges(_: s.ForbidNewPrivileges, __: StepContext) -> None:
    sc.prctl(sc.PR_SET_NO_NEW_PRIVS, 1)


def _die_with_launcher(_: s.DieWithLauncher, __: StepContext) -> None:
    sc.prctl(sc.PR_SET_PDEATHSIG, signal.SIGKILL)
    # If the launcher died before this prctl(2), no signal comes. Then this message fails (EPIPE).
    with socket.socket(fileno=os.dup(STATUS_DESCRIPTOR)) as status:
        channel.send(status, {})


def _reset_signals(_: s.ResetSignals, __: StepContext) -> None:
    # Reset all 64 signals. Python's functions leave out 32 and 33, which the C library reserves;
    # the program that started the launcher may have set them to be ignored.
    for number in range(1, _SIGNALS + 1):
        if number not in (signal.SIGKILL, signal.SIGSTOP):
            sc.set_default_signal(number)
    signal.pthread_sigmask(signal.SIG_SETMASK, ())


def _close_descriptors(_: s.CloseDescriptors, __: StepContext) -> None:
    # Close them before the job's working directory is entered. Otherwise a path like
    # /proc/self/fd/8 could lead to a directory of the host (CVE-2024-21626).
    os.close(USER_NAMESPACE_DESCRIPTOR)
    sc.close_range(INIT_DESCRIPTOR + 1)


def _filter_system_calls(_: s.FilterSystemCalls, context: StepContext) -> None:
    bpf.install(context.filters)


def _become_trampoline(_: s.BecomeTrampoline, __: StepContext) -> None:
    for descriptor in (STATUS_DESCRIPTOR, ORDER_DESCRIPTOR):
        fcntl.fcntl(descriptor, fcntl.F_SETFD, 0)  # the trampoline sets close-on-exec again
    os.execve(TRAMPOLINE_DESCRIPTOR, ["trampoline"], {})  # noqa: S606


def _become_init(_: s.BecomeInit, __: StepContext) -> None:
    os.dup2(REPORT_DESCRIPTOR, _REPORT_OF_INIT)
    # The init closes them itself; in the program's process the trampoline does: `init_program`.
    for descriptor in (STATUS_DESCRIPTOR, ORDER_DESCRIPTOR, TRAMPOLINE_DESCRIPTOR):
        fcntl.fcntl(descriptor, fcntl.F_SETFD, 0)
    os.execve(INIT_DESCRIPTOR, ["init"], {})  # noqa: S606


_APPLY: dict[type, Callable[..., None]] = {
    s.AttachScope: _attach_scope,
    s.ScopeSocketsAndSignals: _scope_sockets_and_signals,
    s.KeepOwnDescriptors: _keep_own_descriptors,
    s.UnshareCgroupNamespace: _unshare_cgroup_namespace,
    s.NewSession: _new_session,
    s.NewKeyring: _new_keyring,
    s.MountTmpfs: _mount_tmpfs,
    s.MakeScratch: _make_scratch,
    s.BindScratch: _bind_scratch,
    s.MapIds: _map_ids,
    s.MountDisk: _mount_disk,
    s.MountOverlay: _mount_overlay,
    s.MountDevices: _mount_devices,
    s.OpenVolume: _open_volume,
    s.PlaceVolume: _place_volume,
    s.MountDevpts: _mount_devpts,
    s.MountProc: _mount_proc,
    s.MaskPath: _mask_path,
    s.ReadOnlyPath: _read_only_path,
    s.PivotRoot: _pivot_root,
    s.UnshareNetwork: _unshare_network,
    s.EnterNetwork: _enter_network,
    s.WriteNames: _write_names,
    s.SetResourceLimit: _set_resource_limit,
    s.SetOomScore: _set_oom_score,
    s.EnterUserNamespace: _enter_user_namespace,
    s.DropCapabilities: _drop_capabilities,
    s.SetUser: _set_user,
    s.ForbidNewPrivileges: _forbid_new_privileges,
    s.DieWithLauncher: _die_with_launcher,
    s.ResetSignals: _reset_signals,
    s.CloseDescriptors: _close_descriptors,
    s.FilterSystemCalls: _filter_system_calls,
    s.BecomeInit: _become_init,
    s.BecomeTrampoline: _become_trampoline,
}
