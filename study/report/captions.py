"""What the figures of a page are called, what they show, and where their numbers are."""

TITLES = {
    "overoptimisation": "Gold and proxy against KL, best-of-n and PPO",
    "conditions": "Gold at the largest n, by condition",
    "gold_against_proxy": "Gold against proxy",
    "gold_by_proxy": "Gold of the reference's samples by quantile of the proxy",
    "win_rate": "Win rate against the reference",
    "length": "Length, and gold that is not length",
    "harm": "Share of prompts that optimisation harms",
    "scaling": "alpha and beta by size",
    "heat_map": "Gold at the peak by size, data and noise",
    "frontier": "KL coefficients",
    "sweep": "Rules to combine seeds",
    "ensembles": "Ensembles under best-of-n",
    "ensembles_ppo": "Policies trained against ensembles",
    "difference": "Gold of one condition's policies less another's, at equal KL",
    "disagreement": "How far seeds disagree on what their mean chooses",
    "accuracy": "Held-out accuracy of the reward models",
    "reward_training": "Training of the reward models",
    "ppo_training": "PPO's own measurements",
    "prediction": "Numbers of reward models against what optimising them did",
}
CAPTIONS = {
    "overoptimisation": "Solid: gold. Dashed: proxy, in the same unit. Bands: gold, 95% for the whole curve, over "
    "seeds and prompts; very wide ones are cut. Thin: single policies. The KL of best-of-n is a bound and that of "
    "PPO is measured: compare within a panel, not across.",
    "conditions": "An ensemble is one model, so its interval is over prompts alone; the others' are over seeds too.",
    "gold_against_proxy": "On the diagonal a gain of the proxy is real; what lies below it is its own. Dotted: PPO.",
    "gold_by_proxy": "Mean gold of the reference's samples by quantile of the proxy.",
    "win_rate": "How often the chosen response beats a sample of the reference by gold, and the ceiling of any proxy.",
    "length": "Left: length of what is chosen. Middle: gold of choosing by proxy, the longest, or at random. Right: "
    "gold of choosing by proxy, less its regression on length within prompts; what is missing here was length.",
    "harm": "Share of prompts whose gold gain is below a value; in the legend, the share below 0 "
    "(`harmed` in conditions.csv).",
    "scaling": "Parameters of the fits by size, 95% intervals from refits on every bootstrap draw.",
    "heat_map": "Gold at the cross-fitted peak, and the n of that peak.",
    "frontier": "Policies of one condition, seeds together: a penalty that only stops early moves along one curve.",
    "ensembles": "Solid: gold. Dashed: what each optimises, an ensemble's own reward in SD within prompts. Bands: "
    "gold, 95% for the whole curve; an ensemble is one model, so its band is over prompts alone.",
    "ensembles_ppo": "Policies against an ensemble of a condition's seeds, beside policies against single ones. Those "
    "against one ensemble share its reward models, so their band is over PPO's own draws and prompts.",
    "difference": "Policies of the same KL, whatever step that was. Bands: 95% for the whole curve, over seeds and "
    "prompts; with one seed each they are of two policies and not of two methods.",
    "sweep": "Rules to combine the seeds of a condition, on the same scores: gold against that of their mean. "
    "*: the interval excludes 0.",
    "disagreement": "Spread over the seeds of a condition at what their mean chooses; a rise leads to where they have "
    "nothing in common.",
    "accuracy": "Pairwise accuracy on pairs that were not trained on, with 95% intervals.",
    "reward_training": "Loss and accuracy of the batches, as trained.",
    "ppo_training": "What PPO measured on its own rollouts; nothing of it is gold.",
    "prediction": "A point is a reward model. Across: what is known of it before it is optimised. Down: what "
    "best-of-n by it did.",
}
DATA = {
    "conditions": "conditions.csv", "gold_by_proxy": "tail.csv", "harm": "per_prompt.csv", "scaling": "conditions.csv",
    "heat_map": "conditions.csv", "sweep": "sweep.csv", "prediction": "rms.csv",
}  # fmt: skip
"""File of a figure's numbers, where that is not curves.csv."""
