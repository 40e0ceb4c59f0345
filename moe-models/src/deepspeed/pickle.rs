//! [`Pickle`]: the values of a pickle as `torch.save` writes them, protocol 2, without running anything that it names.
//!
//! Not candle's reader (0.11): that copies a value each time it is named again, so that a short file can need any amount of memory;
//! it panics on calls with too few arguments and on integers of more than eight bytes, and allocates by lengths that the file names.
//! Here a value is made once and named by its place, nothing is called, and all that is allocated is bounded by the bytes there are.
//!
//! # Source
//! Python's `pickletools`, which documents the opcodes.

use crate::fields::Checked;
use std::collections::HashMap;

/// A value, by its place among all of them.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub(super) struct Id(usize);

/// A value. Dicts, lists and objects may hold themselves.
#[derive(Debug, Clone, PartialEq)]
pub(super) enum Value {
    None,
    Bool(bool),
    Int(i64),
    /// An integer of more than 64 bits.
    Wide,
    Float(f64),
    Text(String),
    Tuple(Vec<Id>),
    List(Vec<Id>),
    Dict(Vec<(Id, Id)>),
    /// A class or function by its module and name.
    Global {
        module: String,
        name: String,
    },
    /// What a call of `callable` would have made, and the state it would have been given.
    Made {
        callable: Id,
        arguments: Id,
        state: Option<Id>,
    },
    /// What lies outside of the pickle, and what it is called there.
    Outside(Id),
}

/// A pickle that was read to its end.
#[derive(Debug)]
pub(super) struct Pickle {
    values: Vec<Value>,
    root: Id,
}

/// Largest pickle that is read; those of checkpoints have some megabytes.
const MOST_BYTES: usize = 64 << 20;
/// Most opcodes that are followed, which bounds the values, those of checkpoints being some ten for each tensor. A value takes far more
/// bytes in memory than in a pickle, and so does each time that it is named.
const MOST_STEPS: usize = 4 << 20;
/// Longest name of a class or a module.
const MOST_NAME: usize = 1024;
const PROTOCOL: u8 = 2;

impl Pickle {
    /// # Errors
    /// What is wrong with it, or the opcode that is not among those that are written.
    pub(super) fn read(bytes: &[u8]) -> Checked<Self> {
        if bytes.len() > MOST_BYTES {
            return Err(format!("its pickle has {} bytes, and at most {MOST_BYTES} are read", bytes.len()));
        }
        if let &[0x80, other, ..] = bytes
            && other != PROTOCOL
        {
            return Err(format!(
                "its pickle has protocol {other}, and only {PROTOCOL} is implemented, torch.save's own: save it again without \
                 pickle_protocol"
            ));
        }
        let mut machine = Machine { rest: bytes, values: vec![], stack: vec![], marks: vec![], memo: HashMap::new() };
        let run = |machine: &mut Machine<'_>| {
            for _ in 0..MOST_STEPS {
                if !machine.step()? {
                    return machine.pop();
                }
            }
            Err(format!("it has more than {MOST_STEPS} values and opcodes, and no more are read"))
        };
        let root = run(&mut machine).map_err(|reason| {
            let at = bytes.len() - machine.rest.len();
            format!("its pickle is damaged at byte {at}: {reason}; copy it again")
        })?;
        Ok(Self { values: machine.values, root })
    }

    pub(super) fn root(&self) -> Id {
        self.root
    }

    pub(super) fn get(&self, id: Id) -> &Value {
        &self.values[id.0]
    }

    pub(super) fn text(&self, id: Id) -> Option<&str> {
        match self.get(id) {
            Value::Text(text) => Some(text),
            _ => None,
        }
    }

    pub(super) fn size(&self, id: Id) -> Option<usize> {
        match self.get(id) {
            Value::Int(value) => usize::try_from(*value).ok(),
            _ => None,
        }
    }

    pub(super) fn tuple(&self, id: Id) -> Option<&[Id]> {
        match self.get(id) {
            Value::Tuple(items) => Some(items),
            _ => None,
        }
    }

    pub(super) fn dict(&self, id: Id) -> Option<&[(Id, Id)]> {
        match self.get(id) {
            Value::Dict(items) => Some(items),
            _ => None,
        }
    }

    /// The module and name of a class or function.
    pub(super) fn global(&self, id: Id) -> Option<(&str, &str)> {
        match self.get(id) {
            Value::Global { module, name } => Some((module, name)),
            _ => None,
        }
    }

    /// The last value of a dict under a key that is text, as Python has it.
    pub(super) fn entry(&self, dict: Id, key: &str) -> Option<Id> {
        self.dict(dict)?.iter().rev().find(|(name, _)| self.text(*name) == Some(key)).map(|(_, value)| *value)
    }
}

struct Machine<'a> {
    rest: &'a [u8],
    values: Vec<Value>,
    stack: Vec<Id>,
    /// How high the stack was at each mark that has not been popped.
    marks: Vec<usize>,
    memo: HashMap<u32, Id>,
}

impl<'a> Machine<'a> {
    fn take(&mut self, count: usize) -> Checked<&'a [u8]> {
        let (taken, rest) = self.rest.split_at_checked(count).ok_or("it ends too early")?;
        self.rest = rest;
        Ok(taken)
    }

    fn bytes<const N: usize>(&mut self) -> Checked<[u8; N]> {
        let (taken, rest) = self.rest.split_first_chunk::<N>().ok_or("it ends too early")?;
        self.rest = rest;
        Ok(*taken)
    }

    fn byte(&mut self) -> Checked<u8> {
        Ok(self.bytes::<1>()?[0])
    }

    fn u32(&mut self) -> Checked<u32> {
        Ok(u32::from_le_bytes(self.bytes()?))
    }

    fn line(&mut self) -> Checked<String> {
        let near = &self.rest[..self.rest.len().min(MOST_NAME)];
        let end = near.iter().position(|&byte| byte == b'\n').ok_or("the name of a class has no end")?;
        let line = text(self.take(end)?)?;
        self.take(1)?;
        Ok(line)
    }

    fn push(&mut self, value: Value) {
        self.stack.push(Id(self.values.len()));
        self.values.push(value);
    }

    /// The top of the stack, above the last mark.
    fn pop(&mut self) -> Checked<Id> {
        let floor = self.marks.last().copied().unwrap_or(0);
        let top = if self.stack.len() > floor { self.stack.pop() } else { None };
        top.ok_or_else(|| "nothing is left on its stack".into())
    }

    fn top(&self) -> Checked<Id> {
        self.stack.last().copied().ok_or_else(|| "nothing is left on its stack".into())
    }

    fn pop_to_mark(&mut self) -> Checked<Vec<Id>> {
        let mark = self.marks.pop().ok_or("there is no mark")?;
        Ok(self.stack.split_off(mark))
    }

    fn pop_tuple<const N: usize>(&mut self) -> Checked<()> {
        let mut items = [self.top()?; N];
        for item in items.iter_mut().rev() {
            *item = self.pop()?;
        }
        self.push(Value::Tuple(items.to_vec()));
        Ok(())
    }

    /// Does what one opcode says; false at the end.
    fn step(&mut self) -> Checked<bool> {
        match self.byte()? {
            // Those of other protocols have opcodes that are refused.
            0x80 => drop(self.byte()?),
            b'.' => return Ok(false),
            b'(' => self.marks.push(self.stack.len()),
            b'0' => drop(self.pop()?),
            b'1' => drop(self.pop_to_mark()?),
            b'N' => self.push(Value::None),
            0x88 => self.push(Value::Bool(true)),
            0x89 => self.push(Value::Bool(false)),
            b'J' => {
                let value = i32::from_le_bytes(self.bytes()?);
                self.push(Value::Int(value.into()));
            }
            b'K' => {
                let value = self.byte()?;
                self.push(Value::Int(value.into()));
            }
            b'M' => {
                let value = u16::from_le_bytes(self.bytes()?);
                self.push(Value::Int(value.into()));
            }
            0x8a => {
                let len = self.byte()?;
                self.push_integer(len.into())?;
            }
            0x8b => {
                let len = self.u32()?;
                self.push_integer(len as usize)?;
            }
            b'G' => {
                let value = f64::from_be_bytes(self.bytes()?);
                self.push(Value::Float(value));
            }
            b'X' => {
                let len = self.u32()?;
                let value = text(self.take(len as usize)?)?;
                self.push(Value::Text(value));
            }
            b')' => self.push(Value::Tuple(vec![])),
            0x85 => self.pop_tuple::<1>()?,
            0x86 => self.pop_tuple::<2>()?,
            0x87 => self.pop_tuple::<3>()?,
            b't' => {
                let items = self.pop_to_mark()?;
                self.push(Value::Tuple(items));
            }
            b']' => self.push(Value::List(vec![])),
            b'a' => {
                let item = self.pop()?;
                self.extend(vec![item])?;
            }
            b'e' => {
                let items = self.pop_to_mark()?;
                self.extend(items)?;
            }
            b'}' => self.push(Value::Dict(vec![])),
            b's' => {
                let (value, key) = (self.pop()?, self.pop()?);
                self.insert(&[key, value])?;
            }
            b'u' => {
                let items = self.pop_to_mark()?;
                self.insert(&items)?;
            }
            b'q' => {
                let index = self.byte()?;
                self.memo.insert(index.into(), self.top()?);
            }
            b'r' => {
                let index = self.u32()?;
                self.memo.insert(index, self.top()?);
            }
            b'h' => {
                let index = self.byte()?;
                self.recall(index.into())?;
            }
            b'j' => {
                let index = self.u32()?;
                self.recall(index)?;
            }
            b'c' => {
                let (module, name) = (self.line()?, self.line()?);
                self.push(Value::Global { module, name });
            }
            b'R' | 0x81 => {
                let (arguments, callable) = (self.pop()?, self.pop()?);
                self.call(callable, arguments);
            }
            b'b' => {
                let (given, target) = (self.pop()?, self.top()?);
                // What a dict is given are attributes, as those of a state_dict; nobody asks for them.
                if let Value::Made { state, .. } = &mut self.values[target.0] {
                    *state = Some(given);
                }
            }
            b'Q' => {
                let id = self.pop()?;
                self.push(Value::Outside(id));
            }
            other => return Err(format!("opcode {other:#04x} is not one that torch.save writes")),
        }
        Ok(true)
    }

    fn push_integer(&mut self, len: usize) -> Checked<()> {
        let bytes = self.take(len)?;
        if bytes.len() > size_of::<i64>() {
            self.push(Value::Wide);
            return Ok(());
        }
        let sign = if bytes.last().is_some_and(|byte| byte & 0x80 != 0) { 0xff } else { 0 };
        let mut whole = [sign; size_of::<i64>()];
        whole[..bytes.len()].copy_from_slice(bytes);
        self.push(Value::Int(i64::from_le_bytes(whole)));
        Ok(())
    }

    fn recall(&mut self, index: u32) -> Checked<()> {
        let id = *self.memo.get(&index).ok_or_else(|| format!("nothing was stored under {index}"))?;
        self.stack.push(id);
        Ok(())
    }

    /// Adds items to the list on top; to other collections, whose items nobody asks for, none.
    fn extend(&mut self, items: Vec<Id>) -> Checked<()> {
        let target = self.top()?;
        match &mut self.values[target.0] {
            Value::List(list) => list.extend(items),
            Value::Made { .. } => {}
            _ => return Err("items are added to what is no list".into()),
        }
        Ok(())
    }

    fn insert(&mut self, items: &[Id]) -> Checked<()> {
        let target = self.top()?;
        let (pairs, odd) = items.as_chunks::<2>();
        match &mut self.values[target.0] {
            _ if !odd.is_empty() => return Err("a key has no value".into()),
            Value::Dict(dict) => dict.extend(pairs.iter().map(|&[key, value]| (key, value))),
            Value::Made { .. } => {}
            _ => return Err("keys are added to what is no dict".into()),
        }
        Ok(())
    }

    /// Pushes what a call makes: of all calls only those that make dicts are known here.
    fn call(&mut self, callable: Id, arguments: Id) {
        let is_dict = match &self.values[callable.0] {
            Value::Global { module, name } => {
                module == "collections" && matches!(name.as_str(), "OrderedDict" | "defaultdict")
            }
            _ => false,
        };
        self.push(if is_dict { Value::Dict(vec![]) } else { Value::Made { callable, arguments, state: None } });
    }
}

fn text(bytes: &[u8]) -> Checked<String> {
    String::from_utf8(bytes.to_vec()).map_err(|_| "text that is not UTF-8".into())
}
