"""What service and launcher say to one another: requests, the policy, the version."""
