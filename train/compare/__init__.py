"""GQA against MLA under fine-tuning: the figure and the ablation of TransMLA."""
