//! Hot-plugged devices in running containers.
//!
//! # The map of the code
//!
//! A device comes or goes, a container starts or stops, a person asks, the agent restarts: all of it goes one way.
//!
//! ```text
//!  kernel and udev events   runtime state files   the ledger        command line, API
//!          │                        │                 │                    │
//!          └───────── observe ──────┴─────────────────┘                    │
//!                        │                                                 │
//!              core::matcher: what should be          core::protocol ──────┘
//!                        │                                 │
//!              core::plan: desired minus observed, as steps with inverses
//!                        │
//!              ops: execute; undo on failure; the ledger is written before the act
//!                   │                       │
//!          sys::device_filter           sys::node
//!          (BPF map at the cgroup root) (mknod in the container's mount namespace,
//!                                       a mount where it has a user namespace)
//! ```
//!
//! | module | what it knows | may import |
//! |---|---|---|
//! | [`core`] | the words and the decisions; no system call, no clock | nothing of ours |
//! | [`sys`] | the kernel: BPF, cgroups, namespaces, device nodes, events; all the `unsafe` | `core` |
//! | [`runtime`] | what each container runtime leaves on disk | `core`, `sys` |
//! | [`log`] | the log, one line an event | `core` |
//! | [`ops`] | carries out plans, keeps the ledger, shows containers what udev knows, explains and proves | the above, `config` |
//! | [`config`] | the host's configuration files | `core` |
//! | [`agent`] | the service: one loop that observes, plans, executes; the socket, in a thread of its own | the above |
//! | [`precreate`] | the OCI hook | `core`, `sys`, `runtime`, `ops`, `config` |
//! | [`failpoint`] | where tests kill the process; nothing in what is shipped | nothing of ours |
//! | [`cli`] | one file a command, what a person reads, and what shells complete | all |

#![deny(unsafe_code)]

pub mod agent;
pub mod cli;
pub mod config;
pub mod core;
pub mod error;
pub mod failpoint;
pub mod log;
pub mod ops;
pub mod precreate;
pub mod runtime;
pub mod sys;
