//! The users of this host, as its name service knows them.

use std::collections::HashMap;
use std::ffi::CString;
use std::sync::{LazyLock, Mutex, PoisonError};
use std::time::{Duration, Instant};

use nix::unistd::{self, Gid, Uid};

use crate::core::permission::User;

/// A user.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Account {
    /// The name, where the number has one.
    pub name: Option<String>,
    /// Number and groups; where the host does not know the user, the number alone.
    pub user: User,
}

/// How long an answer counts: a name service may be slow, and is asked for each event.
const FRESH: Duration = Duration::from_secs(5);

type Answers = HashMap<u32, (Instant, Account)>;
static ANSWERS: LazyLock<Mutex<Answers>> = LazyLock::new(Mutex::default);

impl Account {
    /// Looks the user up (getpwuid(3), getgrouplist(3)).
    pub fn of(uid: u32) -> Account {
        let answers = || ANSWERS.lock().unwrap_or_else(PoisonError::into_inner);
        let known = answers().get(&uid).filter(|(at, _)| at.elapsed() < FRESH).map(|(_, account)| account.clone());
        known.unwrap_or_else(|| {
            let account = look_up(uid);
            answers().insert(uid, (Instant::now(), account.clone()));
            account
        })
    }

    /// What a person would call the user.
    pub fn label(&self) -> String {
        self.name.clone().unwrap_or_else(|| self.user.uid.to_string())
    }
}

fn look_up(uid: u32) -> Account {
    let found = unistd::User::from_uid(Uid::from_raw(uid)).unwrap_or_else(|error| {
        tracing::warn!("user {uid} cannot be looked up, and is in no group: {error}");
        None
    });
    let Some(found) = found else { return Account { name: None, user: User { uid, groups: Vec::new() } } };
    let groups = CString::new(found.name.as_str()).map_err(|_| nix::Error::EINVAL);
    let groups = groups.and_then(|name| unistd::getgrouplist(&name, found.gid)).unwrap_or_else(|error| {
        tracing::warn!("the groups of {} cannot be looked up: {error}", found.name);
        vec![found.gid]
    });
    Account { name: Some(found.name), user: User { uid, groups: groups.into_iter().map(Gid::as_raw).collect() } }
}

/// The name of a group.
pub fn group_name(gid: u32) -> Option<String> {
    Some(unistd::Group::from_gid(Gid::from_raw(gid)).ok()??.name)
}
