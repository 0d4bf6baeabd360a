//! Atomics: the standard library's, one step before each operation. What they give and take is part of the trace.

use std::sync::atomic::{self as inner, Ordering};

use super::{step, with};

fn note<T: Copy>(value: T, word: impl FnOnce(T) -> u64) -> T {
    with(|world| world.note(word(value)));
    value
}

/// A fence: a step.
pub fn fence(order: Ordering) {
    step();
    inner::fence(order);
}

macro_rules! atomic {
    ($name:ident $(<$param:ident>)?, $value:ty, $word:expr) => {
        /// As the standard library's, and laid out like it.
        #[derive(Debug, Default)]
        #[repr(transparent)]
        pub struct $name $(<$param>)? (inner::$name $(<$param>)?);

        impl $(<$param>)? $name $(<$param>)? {
            /// An atomic that holds `value`.
            pub const fn new(value: $value) -> Self {
                Self(inner::$name::new(value))
            }

            /// What it holds.
            pub fn load(&self, order: Ordering) -> $value {
                step();
                note(self.0.load(order), $word)
            }

            /// Holds `value` from now on.
            pub fn store(&self, value: $value, order: Ordering) {
                step();
                self.0.store(note(value, $word), order);
            }

            /// Holds `value` from now on: what it held.
            pub fn swap(&self, value: $value, order: Ordering) -> $value {
                step();
                note(self.0.swap(value, order), $word)
            }

            /// Holds `new` from now on if it holds `current`.
            ///
            /// # Errors
            /// What it holds instead.
            pub fn compare_exchange(
                &self,
                current: $value,
                new: $value,
                success: Ordering,
                failure: Ordering,
            ) -> Result<$value, $value> {
                step();
                let result = self.0.compare_exchange(current, new, success, failure);
                with(|world| world.note(u64::from(result.is_ok())));
                let (Ok(value) | Err(value)) = result;
                note(value, $word);
                result
            }

            /// The same: it does not fail for no reason.
            ///
            /// # Errors
            /// What it holds instead.
            pub fn compare_exchange_weak(
                &self,
                current: $value,
                new: $value,
                success: Ordering,
                failure: Ordering,
            ) -> Result<$value, $value> {
                self.compare_exchange(current, new, success, failure)
            }

            /// Exchanges what it holds for what `next` makes of it, until nobody comes between.
            ///
            /// # Errors
            /// What it holds, if `next` makes nothing of it.
            pub fn fetch_update(
                &self,
                set: Ordering,
                fetch: Ordering,
                mut next: impl FnMut($value) -> Option<$value>,
            ) -> Result<$value, $value> {
                let mut last = self.load(fetch);
                while let Some(value) = next(last) {
                    match self.compare_exchange(last, value, set, fetch) {
                        Ok(last) => return Ok(last),
                        Err(now) => last = now,
                    }
                }
                Err(last)
            }

            /// An atomic where a value lies.
            ///
            /// # Safety
            /// As the standard library's.
            pub const unsafe fn from_ptr<'a>(value: *mut $value) -> &'a Self {
                // SAFETY: the caller's word; this is laid out like the standard library's, and that like the value.
                unsafe { &*value.cast::<Self>() }
            }

            /// What it holds; nobody else can reach it.
            pub fn get_mut(&mut self) -> &mut $value {
                self.0.get_mut()
            }

            /// What it held.
            pub fn into_inner(self) -> $value {
                self.0.into_inner()
            }
        }
    };
}

macro_rules! fetch {
    ($name:ident, $value:ty, $word:expr, $($fetch:ident)*) => {
        impl $name {
            $(
                /// As the standard library's.
                pub fn $fetch(&self, value: $value, order: Ordering) -> $value {
                    step();
                    note(self.0.$fetch(value, order), $word)
                }
            )*
        }
    };
}

macro_rules! integers {
    ($($name:ident $value:ty,)*) => {
        $(
            atomic!($name, $value, |value| value as u64);
            fetch!($name, $value, |value| value as u64,
                fetch_add fetch_sub fetch_and fetch_or fetch_max);
        )*
    };
}

integers! {
    AtomicU8 u8,
    AtomicU32 u32,
    AtomicU64 u64,
    AtomicUsize usize,
}
atomic!(AtomicBool, bool, u64::from);
// Where things lie is not the simulation's to decide, so that is no part of the trace.
atomic!(AtomicPtr<T>, *mut T, |_| 0);
