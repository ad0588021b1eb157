//! What Bash has to read. clap's own script takes the words as Bash has them, which ends one at `:` and at `=`:
//! `podman:web` and `usb=10c4:ea60` are three words to it.

use std::ffi::OsString;
use std::io::{Error, Write};
use std::path::Path;

use clap_complete::env::{Bash as Clap, EnvCompleter};

/// Takes the words from the line, and leaves out of what it offers what Bash counts to an earlier word ($2 is the rest).
const SCRIPT: &str = r#"_qm_hotplug() {
    local line=${COMP_LINE:0:COMP_POINT} words rest=$2 offers
    read -ra words <<<"$line"
    [[ $line != *[[:blank:]] ]] || words+=('')
    # Called for `sudo qm-hotplug …`, it gets the word that ends another one.
    [[ $rest != [:=] ]] || rest=''
    mapfile -t offers < <(
        COMPLETE=bash _CLAP_IFS=$'\n' _CLAP_COMPLETE_INDEX=$((${#words[@]} - 1)) PROGRAM -- "${words[@]}" 2>/dev/null
    )
    COMPREPLY=("${offers[@]#"${words[-1]%"$rest"}"}")
    if [[ ${#COMPREPLY[@]} -eq 1 && ${COMPREPLY[0]} == *[/:=.,] ]]; then
        compopt -o nospace
    fi
}
complete -o nosort -o bashdefault -F _qm_hotplug qm-hotplug
"#;

pub(super) struct Bash;

impl EnvCompleter for Bash {
    fn name(&self) -> &'static str {
        Clap.name()
    }

    fn is(&self, name: &str) -> bool {
        Clap.is(name)
    }

    fn write_registration(
        &self,
        _var: &str,
        _name: &str,
        _bin: &str,
        program: &str,
        out: &mut dyn Write,
    ) -> Result<(), Error> {
        let quoted = format!("'{}'", program.replace('\'', r"'\''"));
        out.write_all(SCRIPT.replace("PROGRAM", &quoted).as_bytes())
    }

    fn write_complete(
        &self,
        command: &mut clap::Command,
        words: Vec<OsString>,
        directory: Option<&Path>,
        out: &mut dyn Write,
    ) -> Result<(), Error> {
        Clap.write_complete(command, words, directory, out)
    }
}
