"""From runs and tables to points, a fitted law, a plan for a budget, and a report."""
