//! What holds for whatever bytes: a function for each fuzz target of `tests/fuzz`, defined beside what it looks at.

pub use crate::registry::fuzz::registry;
pub use crate::source::uffd::fuzz::uffd_event;
pub use crate::source::unotify::fuzz::{proc_maps, seccomp_call};

#[cfg(test)]
#[path = "../../tests/fuzz/replay.rs"]
mod replay;

#[cfg(test)]
mod tests {
    use super::replay::replay;

    #[test]
    fn the_corpus_of_the_registry_holds() {
        replay("registry", 256, super::registry);
    }

    #[test]
    fn the_corpus_of_the_event_sources_holds() {
        replay("proc_maps", 256, super::proc_maps);
        replay("uffd_event", 256, super::uffd_event);
        replay("seccomp_call", 256, super::seccomp_call);
    }
}
