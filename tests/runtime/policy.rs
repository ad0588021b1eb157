pub(crate) const CASES: &[crate::Case] = &[];
pub(crate) const ONCE: &[crate::CaseOnce] = &[];
