//! How many messages and bytes a rank sends in one exchange of rows, by each form and on each level, counted in the plans of
//! all ranks, beside the paper's formulas. Nothing is sent: this needs neither MPI nor more than one process.
//! `cargo xtask bench parallel counts` keeps the output.

mod form;

use anyhow::Result;
use clap::Parser;
use form::{Form, Layout, Level, Sent, sent};

/// Counted messages and bytes of one rank.
#[derive(Parser)]
struct Args {
    /// Numbers of ranks.
    #[arg(long, value_delimiter = ',', default_value = "8,16,32,64,128,256,512,1024")]
    ranks: Vec<usize>,
    /// G: ranks of a node.
    #[arg(long, default_value_t = 8)]
    ranks_per_node: usize,
    /// L: ranks of a tensor group, for the coordinated forms.
    #[arg(long, value_delimiter = ',', default_value = "2,4,8")]
    tensor_ranks: Vec<usize>,
    /// Bytes that each rank sends to each.
    #[arg(long, default_value_t = 64)]
    bytes: usize,
}

/// The paper's number of messages, section 5.3 and 5.4, without the constants.
fn formula(form: Form, layout: Layout) -> (&'static str, usize) {
    let Layout { ranks: p, ranks_per_node: g, tensor_ranks: l } = layout;
    match form {
        Form::Flat => ("p", p),
        Form::Hierarchical => ("G + p/G", g + p / g),
        Form::Coordinated => ("p/L + L", p / l + l),
        Form::Both => ("G/L + p/G + L", g / l + p / g + l),
    }
}

/// The largest number of messages and of rows of any rank, on each level.
fn most(form: Form, layout: Layout) -> Sent {
    (0..layout.ranks).map(|rank| sent(form, layout, rank, 1)).fold(Sent::default(), |most, sent| Sent {
        intra_node: largest(most.intra_node, sent.intra_node),
        inter_node: largest(most.inter_node, sent.inter_node),
    })
}

fn largest(a: Level, b: Level) -> Level {
    Level { messages: a.messages.max(b.messages), rows: a.rows.max(b.rows) }
}

fn print_row(form: Form, layout: Layout, bytes: usize) {
    let Sent { intra_node, inter_node } = most(form, layout);
    let tensor_ranks = if form.is_coordinated() { layout.tensor_ranks.to_string() } else { "-".into() };
    let (text, value) = formula(form, layout);
    println!(
        "{:>5} {tensor_ranks:>2}  {:<12} {:>8} {:>8} {:>8}   {text:<14}{value:>6} {:>11} {:>11}",
        layout.ranks,
        form.name(),
        intra_node.messages,
        inter_node.messages,
        intra_node.messages + inter_node.messages,
        intra_node.rows * bytes,
        inter_node.rows * bytes,
    );
}

fn main() -> Result<()> {
    let args = Args::parse();
    let layout = |ranks, tensor_ranks| Layout { ranks, ranks_per_node: args.ranks_per_node, tensor_ranks };
    for (&ranks, &tensor_ranks) in args.ranks.iter().flat_map(|ranks| args.tensor_ranks.iter().map(move |l| (ranks, l)))
    {
        layout(ranks, tensor_ranks).check()?;
    }
    println!(
        "One exchange of {} bytes a pair over nodes of G = {} ranks: what the rank that sends",
        args.bytes, args.ranks_per_node
    );
    println!("most sends to others. The coordinated forms include the gathering in the tensor group of L ranks;");
    println!("on the way to the experts, where nothing is gathered, they send L - 1 messages less.\n");
    println!("                             messages                                            bytes");
    println!("    p  L  form          in node  between      all   the paper's         in node     between");
    for &ranks in &args.ranks {
        for form in [Form::Flat, Form::Hierarchical] {
            print_row(form, layout(ranks, 1), args.bytes);
        }
        for &tensor_ranks in &args.tensor_ranks {
            for form in [Form::Coordinated, Form::Both] {
                print_row(form, layout(ranks, tensor_ranks), args.bytes);
            }
        }
    }
    Ok(())
}
