//! apt-get with a state of its own: it reads which archive the machine uses and changes nothing of the machine. Works without
//! privilege.

use std::fmt::Write as _;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use crate::error::{Error, at};
use crate::process::call;

/// The release that packages are taken from, whatever release this machine runs: what is tried is what was tried before.
const RELEASE: &str = "bookworm";
/// The release with the newer QEMU.
const BACKPORTS: &str = "bookworm-backports";

const LIMIT: Duration = Duration::from_secs(300);
const NO_APT: &str = "this needs Debian's apt and dpkg";

/// A private state of apt below one directory, its lists up to date.
#[derive(Debug)]
pub(crate) struct Apt {
    directory: PathBuf,
    /// The archive still has the backports.
    backports: bool,
}

impl Apt {
    /// Fetches the package lists of the archive that the machine's own sources name, or of `archive`.
    pub(crate) fn new(directory: PathBuf, archive: Option<&str>) -> Result<Self, Error> {
        for part in ["lists/partial", "cache/archives/partial"] {
            let part = directory.join(part);
            at(&part, std::fs::create_dir_all(&part))?;
        }
        let log = directory.join("log");
        // Nothing is fetched: this prints which files an update would fetch.
        let uris = call(
            Command::new("apt-get")
                .args(["update", "--print-uris"])
                .arg("-o")
                .arg(dir_option("Lists", &directory)),
            &log,
            LIMIT,
            NO_APT,
        )?;
        let archives = Archives::find(&uris, archive).ok_or(Error::NoArchive)?;
        // How the machine reaches its archive (proxies and the like) stays; hooks and further sources do not.
        let settings = call(
            Command::new("apt-config").args(["dump", "Acquire"]),
            &log,
            LIMIT,
            NO_APT,
        )?;
        let mut apt = Self {
            directory,
            backports: true,
        };
        apt.write("status", "")?;
        apt.write("apt.conf", &apt.configuration(&settings))?;
        apt.write("sources.list", &archives.sources(apt.backports))?;
        if apt.run("apt-get", &["update", "-q"]).is_err() {
            // Backports of a release go to another archive one day. QEMU 7.2 does as well; with any other reason this fails too.
            apt.backports = false;
            apt.write("sources.list", &archives.sources(apt.backports))?;
            apt.run("apt-get", &["update", "-q"])?;
        }
        Ok(apt)
    }

    /// Downloads a package and all that it depends on, as if nothing were installed here; gives the files.
    pub(crate) fn closure(&self, package: &str) -> Result<Vec<PathBuf>, Error> {
        let release = if self.backports { BACKPORTS } else { RELEASE };
        let options = ["install", "-q", "--download-only", "-y", "-t"];
        self.run("apt-get", &[&options[..], &[release, package]].concat())?;
        self.debs()
    }

    /// Downloads the package that `meta` depends on whose name begins with `wanted`; gives its name and file.
    pub(crate) fn dependency(
        &self,
        meta: &'static str,
        wanted: &'static str,
    ) -> Result<(String, PathBuf), Error> {
        let depends = self.run("apt-cache", &["depends", meta])?;
        let name = depends
            .lines()
            .filter_map(|line| line.trim().strip_prefix("Depends: "))
            .find(|name| name.starts_with(wanted))
            .ok_or(Error::NoDependency {
                package: meta,
                wanted,
            })?;
        self.run("apt-get", &["download", "-q", name])?;
        let archives = self.archives();
        let file = self.debs()?.into_iter().find(|file| {
            file.file_name()
                .is_some_and(|file| file.to_string_lossy().starts_with(&format!("{name}_")))
        });
        let file = file.ok_or_else(|| Error::Missing {
            package: name.to_owned(),
            file: format!("{name}_*.deb"),
            cache: archives,
        })?;
        Ok((name.to_owned(), file))
    }

    /// Unpacks packages into a directory; nothing is installed and no script runs.
    pub(crate) fn unpack(&self, packages: &[PathBuf], target: &Path) -> Result<(), Error> {
        let log = self.directory.join("log");
        for package in packages {
            call(
                Command::new("dpkg").arg("-x").arg(package).arg(target),
                &log,
                LIMIT,
                NO_APT,
            )?;
        }
        Ok(())
    }

    fn archives(&self) -> PathBuf {
        self.directory.join("cache/archives")
    }

    fn debs(&self) -> Result<Vec<PathBuf>, Error> {
        let archives = self.archives();
        let entries = at(
            &archives,
            std::fs::read_dir(&archives).and_then(Iterator::collect::<Result<Vec<_>, _>>),
        )?;
        let files = entries.into_iter().map(|entry| entry.path());
        Ok(files
            .filter(|file| file.extension().is_some_and(|end| end == "deb"))
            .collect())
    }

    fn run(&self, program: &str, arguments: &[&str]) -> Result<String, Error> {
        let mut command = Command::new(program);
        command
            .args(arguments)
            .env("APT_CONFIG", self.directory.join("apt.conf"))
            .env("LC_ALL", "C")
            // `download` writes to the current directory.
            .current_dir(self.archives());
        call(&mut command, &self.directory.join("log"), LIMIT, NO_APT)
    }

    fn write(&self, name: &str, text: &str) -> Result<(), Error> {
        let file = self.directory.join(name);
        at(&file, std::fs::write(&file, text))
    }

    fn configuration(&self, settings: &str) -> String {
        let mut text = String::new();
        // Only the package lists themselves, not the extra indexes that some machines want.
        for line in settings
            .lines()
            .filter(|line| !line.starts_with("Acquire::IndexTargets"))
        {
            let _ = writeln!(text, "{line}");
        }
        let directory = self.directory.display();
        let _ = write!(
            text,
            "Acquire::Languages:: \"none\";\n\
             APT::Architecture \"amd64\";\n\
             APT::Architectures:: \"amd64\";\n\
             APT::Install-Recommends \"false\";\n\
             APT::Sandbox::User \"\";\n\
             Debug::NoLocking \"true\";\n\
             Dir::Cache \"{directory}/cache\";\n\
             Dir::Etc::Main \"/dev/null\";\n\
             Dir::Etc::Parts \"/dev/null\";\n\
             Dir::Etc::Preferences \"/dev/null\";\n\
             Dir::Etc::PreferencesParts \"/dev/null\";\n\
             Dir::Etc::SourceList \"{directory}/sources.list\";\n\
             Dir::Etc::SourceParts \"/dev/null\";\n\
             Dir::State::extended_states \"{directory}/extended_states\";\n\
             Dir::State::Lists \"{directory}/lists\";\n\
             Dir::State::status \"{directory}/status\";\n"
        );
        text
    }
}

fn dir_option(what: &str, directory: &Path) -> String {
    format!("Dir::State::{what}={}/lists", directory.display())
}

/// The archive that packages come from.
#[derive(Debug, PartialEq, Eq)]
struct Archives {
    main: String,
    security: Option<String>,
}

impl Archives {
    /// Those that an update of the machine would read, by the files that it would fetch. Mirrors keep Debian below a directory
    /// `debian`, its security updates below `debian-security`.
    fn find(uris: &str, given: Option<&str>) -> Option<Self> {
        let base = |line: &str| Some(line.strip_prefix('\'')?.split_once("/dists/")?.0.to_owned());
        let bases: Vec<String> = uris.lines().filter_map(base).collect();
        let below = |name: &str| {
            let found = bases
                .iter()
                .find(|base| base.split('/').any(|part| part == name));
            found.cloned()
        };
        Some(Self {
            main: given.map(str::to_owned).or_else(|| below("debian"))?,
            security: below("debian-security"),
        })
    }

    /// As apt reads them.
    fn sources(&self, backports: bool) -> String {
        let keys = "/usr/share/keyrings/debian-archive-keyring.gpg";
        // Without that file apt tries the keys that it trusts anyway.
        let options = Path::new(keys)
            .exists()
            .then(|| format!("[signed-by={keys}] "));
        let options = options.unwrap_or_default();
        let security = format!("{RELEASE}-security");
        let releases = [
            (Some(&self.main), RELEASE),
            (Some(&self.main).filter(|_| backports), BACKPORTS),
            (self.security.as_ref(), security.as_str()),
        ];
        releases
            .iter()
            .fold(String::new(), |text, (archive, release)| match archive {
                Some(archive) => format!("{text}deb {options}{archive} {release} main\n"),
                None => text,
            })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_machines_own_archive_is_found_and_others_are_left_alone() {
        let uris = "'http://other.example/apt/dists/x/InRelease' other 0 \n\
                    'http://mirror.example/debian/dists/trixie/InRelease' a 0 \n\
                    'http://mirror.example/debian-security/dists/trixie-security/InRelease' b 0 \n";
        let archives = Archives::find(uris, None).unwrap();
        let ends = |text: &str, wanted: &[&str]| {
            let lines: Vec<&str> = text.lines().collect();
            assert_eq!(lines.len(), wanted.len(), "{text}");
            for (line, wanted) in lines.iter().zip(wanted) {
                assert!(line.starts_with("deb ") && line.ends_with(wanted), "{text}");
            }
        };
        let main = "http://mirror.example/debian bookworm main";
        let backports = "http://mirror.example/debian bookworm-backports main";
        let security = "http://mirror.example/debian-security bookworm-security main";
        ends(&archives.sources(true), &[main, backports, security]);
        ends(&archives.sources(false), &[main, security]);
    }

    #[test]
    fn no_archive_is_an_error_unless_one_is_given() {
        let uris = "'http://other.example/ubuntu/dists/noble/InRelease' a 0 \n";
        assert_eq!(Archives::find(uris, None), None);
        let given = Archives::find(uris, Some("http://given.example/debian")).unwrap();
        assert_eq!(given.main, "http://given.example/debian");
        assert_eq!(given.security, None);
    }
}
