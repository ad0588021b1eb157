//! The agent's socket: a thread of its own, so that whoever calls keeps no device event waiting.

use std::cell::RefCell;
use std::collections::HashMap;
use std::io;
use std::os::unix::fs::{PermissionsExt, chown};
use std::os::unix::net::UnixListener as Listener;
use std::path::{Path, PathBuf};
use std::rc::Rc;
use std::sync::Arc;
use std::time::Duration;

use nix::unistd::Group;
use tokio::net::{UnixListener, UnixStream};
use tokio::sync::{Mutex, mpsc, oneshot, watch};
use tokio::task::{JoinSet, LocalSet};
use tokio::time::{sleep, timeout};

use crate::agent::conversation;
use crate::agent::monitors::Monitors;
use crate::core::operator::Caller;
use crate::core::protocol::{Reply, Request};
use crate::core::settings::Settings;
use crate::error::{Error, Result};
use crate::sys::activation;

/// Who is in this group may connect; systemd makes it (sysusers.d).
const GROUP: &str = "qm-hotplug";
/// How many connections one user may have: each may hold a request of the longest kind.
const MOST: usize = 128;
/// How long nobody is let in when there are no descriptors left.
const EXHAUSTED: Duration = Duration::from_millis(100);
/// How many questions about containers are looked into at once; others wait.
const LOOKING: usize = 2;

/// Who calls (unix(7), `SO_PEERCRED`).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Peer {
    pub(super) uid: u32,
    /// 0 where it is not known.
    pub(super) pid: i32,
}

/// A request, and where its answer goes.
#[derive(Debug)]
pub(super) struct Call {
    pub(super) request: Request,
    pub(super) peer: Peer,
    /// Who that is, where it decides what may be changed.
    pub(super) caller: Option<Caller>,
    pub(super) answer: oneshot::Sender<Reply>,
}

/// What those who serve callers have of the agent.
#[derive(Debug, Clone)]
pub(super) struct Agent {
    /// What only the loop can answer.
    pub(super) calls: mpsc::Sender<Call>,
    pub(super) monitors: Monitors,
    /// The configuration that is in force.
    pub(super) settings: watch::Receiver<Arc<Settings>>,
}

/// The agent's end of it. Who drops [`Api::calls`] ends all conversations.
#[derive(Debug)]
pub(super) struct Api {
    /// What only the agent's loop can answer.
    pub(super) calls: mpsc::Receiver<Call>,
    /// Comes when all have been told of the end.
    ended: oneshot::Receiver<()>,
    /// The socket's path, where it is ours to remove.
    path: Option<PathBuf>,
}

impl Api {
    /// Listens at the socket that systemd hands over, or at one of our own at that path.
    pub(super) fn start(path: &Path, monitors: Monitors, settings: watch::Receiver<Arc<Settings>>) -> Result<Api> {
        let failed = || Error::host::<io::Error>(format!("listen at {}", path.display()));
        let given = activation::socket().map_err(failed())?;
        let path = given.is_none().then(|| path.to_owned());
        let listener = given.map_or_else(|| listen(path.as_deref().expect("it is ours")), |fd| Ok(Listener::from(fd)));
        let listener = listener.map_err(failed())?;
        let ((sender, calls), (say, ended)) = (mpsc::channel(16), oneshot::channel());
        let agent = Agent { calls: sender, monitors, settings };
        let mut runtime = tokio::runtime::Builder::new_current_thread();
        let runtime = runtime.enable_all().max_blocking_threads(LOOKING).build().map_err(failed())?;
        let is_ours = path.is_some();
        let life = move || {
            LocalSet::new().block_on(&runtime, serve(listener, is_ours, &agent));
            let _ = say.send(());
            // Who looks into a container that does not answer is not waited for.
            runtime.shutdown_background();
        };
        std::thread::Builder::new().name("api".into()).spawn(life).map_err(failed())?;
        Ok(Api { calls, ended, path })
    }

    /// Takes no more requests, and waits so long at most until those who are connected have been told.
    pub(super) async fn end(self, patience: Duration) {
        let Api { calls, ended, path } = self;
        // A command that comes later does itself what it was asked for, once the ledger is free.
        if let Some(path) = path {
            let _ = std::fs::remove_file(path);
        }
        drop(calls);
        let _ = timeout(patience, ended).await;
    }
}

/// Makes the socket, for root and the group, where that is there. One that a killed agent left is replaced: whoever calls
/// this holds the ledger's lock. Everything else in its directory is root's alone.
fn listen(path: &Path) -> io::Result<Listener> {
    match std::fs::remove_file(path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
        _ => {}
    }
    let set = |path: &Path, mode| std::fs::set_permissions(path, std::fs::Permissions::from_mode(mode));
    let directory = path.parent().expect("it is in a directory");
    // Nobody comes in between bind and chmod.
    set(directory, 0o700)?;
    let listener = Listener::bind(path)?;
    match Group::from_name(GROUP)? {
        Some(group) => {
            chown(path, None, Some(group.gid.as_raw()))?;
            set(path, 0o660)?;
            set(directory, 0o711)?;
        }
        None => set(path, 0o600)?,
    }
    Ok(listener)
}

/// Lets in who calls, until nobody takes requests any more.
async fn serve(listener: Listener, is_ours: bool, agent: &Agent) {
    let listener = match listener.set_nonblocking(true).and_then(|()| UnixListener::from_std(listener)) {
        Ok(listener) => listener,
        Err(error) => return tracing::error!("nobody can call: {error}"),
    };
    let (mut callers, users) = (JoinSet::new(), Users::default());
    let let_in = |callers: &mut JoinSet<()>, stream: UnixStream| {
        let Ok(credentials) = stream.peer_cred() else { return };
        let peer = Peer { uid: credentials.uid(), pid: credentials.pid().unwrap_or(0) };
        match Seat::take(&users, peer.uid) {
            Some(seat) => {
                let (turn, agent) = (Rc::clone(&seat.turn), agent.clone());
                callers.spawn_local(async move {
                    conversation::lead(stream, peer, turn, agent).await;
                    drop(seat);
                });
            }
            None => {
                let container = format!("uid {}", peer.uid);
                tracing::warn!(
                    container,
                    "pid {} of uid {} has {MOST} connections, and gets no more",
                    peer.pid,
                    peer.uid
                );
            }
        }
    };
    loop {
        tokio::select! {
            accepted = listener.accept() => match accepted {
                Ok((stream, _)) => let_in(&mut callers, stream),
                Err(error) => {
                    tracing::warn!("nobody can call for a moment: {error}");
                    sleep(EXHAUSTED).await;
                }
            },
            Some(_) = callers.join_next() => {}
            () = agent.calls.closed() => break,
        }
    }
    // Who is waiting at a socket of systemd's gets his answer from the next agent.
    while is_ours && let Ok(Ok((stream, _))) = timeout(Duration::ZERO, listener.accept()).await {
        let_in(&mut callers, stream);
    }
    drop(listener);
    while callers.join_next().await.is_some() {}
}

/// Those who are connected, by uid: how many connections each has, and whose turn it is to look into something.
type Users = Rc<RefCell<HashMap<u32, (usize, Rc<Mutex<()>>)>>>;

/// One of a user's connections.
struct Seat {
    uid: u32,
    turn: Rc<Mutex<()>>,
    users: Users,
}

impl Seat {
    fn take(users: &Users, uid: u32) -> Option<Seat> {
        let mut all = users.borrow_mut();
        let (count, turn) = all.entry(uid).or_default();
        let has_room = *count < MOST;
        *count += usize::from(has_room);
        has_room.then(|| Seat { uid, turn: Rc::clone(turn), users: Rc::clone(users) })
    }
}

impl Drop for Seat {
    fn drop(&mut self) {
        let mut all = self.users.borrow_mut();
        if let Some((count, _)) = all.get_mut(&self.uid) {
            *count -= 1;
            if *count == 0 {
                all.remove(&self.uid);
            }
        }
    }
}
