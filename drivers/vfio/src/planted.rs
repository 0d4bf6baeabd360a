//! Guards that can be taken out, as core's can and by the same name in the environment, in builds of tests with `--cfg planted`. In any
//! other build `planted!` is `false`.

/// Whether the guard `name` is taken out.
macro_rules! planted {
    ($name:literal) => {{
        #[cfg(planted)]
        let planted = shootdown::is_planted($name);
        #[cfg(not(planted))]
        let planted = false;
        planted
    }};
}
