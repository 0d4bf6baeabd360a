//! Guards that can be taken out, to prove that a check notices: in builds of tests with `--cfg planted`, by name, through the
//! environment. In any other build `planted!` is `false` and this module is empty.

/// Whether the guard `name` is taken out.
macro_rules! planted {
    ($name:literal) => {{
        #[cfg(planted)]
        let planted = $crate::planted::is($name);
        #[cfg(not(planted))]
        let planted = false;
        planted
    }};
}

/// Whether the guard `name` is taken out.
#[cfg(planted)]
pub fn is(name: &str) -> bool {
    static PLANTED: std::sync::OnceLock<String> = std::sync::OnceLock::new();
    let planted = PLANTED.get_or_init(|| std::env::var("SHOOTDOWN_PLANTED").unwrap_or_default());
    planted == name
}
