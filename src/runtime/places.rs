//! Where the runtimes keep what tells of a container: patterns of paths, whose directories come and go.

use std::path::{Path, PathBuf};

use crate::sys::cgroup::CgroupRoot;

/// Who reads what is at a place.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Adapter {
    /// A directory of crun or runc, called by Podman or by a person.
    Podman,
    /// A directory of crun or runc, called by Docker's part of containerd.
    Docker,
    /// A directory of crun or runc, called by containerd.
    Containerd,
    /// A cgroup of LXC or Incus.
    Lxc,
    /// A file of systemd-machined.
    Nspawn,
}

/// Where containers of one kind are to be found: the last component stands for the container.
#[derive(Debug, Clone)]
pub struct Pattern {
    adapter: Adapter,
    /// Components, of which the last byte may be a `*` that stands for any end.
    components: Vec<String>,
}

/// What a path is to a pattern.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Match {
    /// A directory above containers.
    Above,
    /// A container's place.
    Container(Adapter),
}

/// A container's place.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Place {
    /// Who reads it.
    pub adapter: Adapter,
    /// A directory, or a file.
    pub path: PathBuf,
}

impl Adapter {
    /// Whether the place is a directory in which files come and go: they tell of the container's state.
    pub fn has_state_files(self) -> bool {
        matches!(self, Adapter::Podman | Adapter::Docker | Adapter::Containerd)
    }
}

/// The names of files that tell of a container's state: both are renamed into place, and `exec.fifo` is removed when the
/// container's own program starts (runtime-spec, `start`; the name is runc's and crun's).
pub const STATE_FILES: [&str; 3] = ["state.json", "status", "exec.fifo"];

impl Pattern {
    fn new(adapter: Adapter, path: &str) -> Pattern {
        let components = path.split('/').filter(|part| !part.is_empty()).map(str::to_owned).collect();
        Pattern { adapter, components }
    }

    /// What the path, which begins with `/`, is to this pattern.
    fn matches(&self, path: &Path) -> Option<Match> {
        let mut expected = self.components.iter();
        for component in path.strip_prefix("/").ok()?.iter() {
            let (component, expected) = (component.to_str()?, expected.next()?);
            let fits = match expected.strip_suffix('*') {
                // Names that begin with a dot are of files that are being written.
                Some(start) => component.starts_with(start) && !component.starts_with('.'),
                None => component == expected,
            };
            if !fits {
                return None;
            }
        }
        Some(if expected.next().is_none() { Match::Container(self.adapter) } else { Match::Above })
    }

    /// The deepest directory above all its containers whose name is certain.
    fn base(&self) -> PathBuf {
        Path::new("/").join(self.components.iter().take_while(|part| !part.ends_with('*')).collect::<PathBuf>())
    }
}

/// All patterns of a host.
#[derive(Debug, Clone)]
pub struct Patterns(Vec<Pattern>);

impl Patterns {
    /// Those of this host, as root's engines have them.
    pub fn of_host() -> Patterns {
        let mut all = vec![
            Pattern::new(Adapter::Podman, "/run/crun/*"),
            Pattern::new(Adapter::Podman, "/run/runc/*"),
            // Docker's name for its part of containerd, and the runtime's name as Docker's configuration has it.
            Pattern::new(Adapter::Docker, "/run/docker/runtime-*/moby/*"),
            Pattern::new(Adapter::Containerd, "/run/containerd/runc/*/*"),
            Pattern::new(Adapter::Nspawn, "/run/systemd/machines/*"),
        ];
        if let Ok(root) = CgroupRoot::find() {
            all.push(Pattern::new(Adapter::Lxc, &format!("{}/lxc.payload.*", root.path.display())));
        }
        Patterns(all)
    }

    /// Those below a directory of a test.
    #[cfg(test)]
    pub(crate) fn of(patterns: &[(Adapter, String)]) -> Patterns {
        Patterns(patterns.iter().map(|(adapter, path)| Pattern::new(*adapter, path)).collect())
    }

    /// What the path is to any of them.
    pub fn matches(&self, path: &Path) -> Option<Match> {
        self.0.iter().find_map(|pattern| pattern.matches(path))
    }

    /// The directories to begin with, one for each pattern. They need not exist.
    pub fn bases(&self) -> Vec<PathBuf> {
        let mut bases: Vec<PathBuf> = self.0.iter().map(Pattern::base).collect();
        bases.dedup();
        bases
    }

    /// The places of containers that are there now.
    pub fn places(&self) -> Vec<Place> {
        let (mut places, mut directories) = (Vec::new(), self.bases());
        while let Some(directory) = directories.pop() {
            for path in entries(&directory) {
                match self.matches(&path) {
                    Some(Match::Above) => directories.push(path),
                    Some(Match::Container(adapter)) => places.push(Place { adapter, path }),
                    None => {}
                }
            }
        }
        places
    }
}

/// What is in a directory; nothing, where it is none.
pub fn entries(directory: &Path) -> Vec<PathBuf> {
    std::fs::read_dir(directory).into_iter().flatten().flatten().map(|entry| entry.path()).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_a_path_is() {
        let patterns = Patterns::of_host();
        let matches = |path: &str| patterns.matches(Path::new(path));
        for path in ["/", "/run", "/run/crun", "/run/docker", "/run/docker/runtime-runc/moby", "/run/systemd/machines"]
        {
            assert_eq!(matches(path), Some(Match::Above), "{path}");
        }
        for (path, adapter) in [
            ("/run/crun/abc", Adapter::Podman),
            ("/run/docker/runtime-crun/moby/abc", Adapter::Docker),
            ("/run/containerd/runc/k8s.io/abc", Adapter::Containerd),
            ("/run/systemd/machines/web", Adapter::Nspawn),
        ] {
            assert_eq!(matches(path), Some(Match::Container(adapter)), "{path}");
        }
        for path in [
            "/run/crun/abc/status",
            "/run/systemd/machines/.#web12",
            "/run/docker/runtime-runc/plugins.moby",
            "/run/docker/swarm",
            "/runx",
            "run/crun",
        ] {
            assert_eq!(matches(path), None, "{path}");
        }
    }
}
