# One state a workspace: `default` is production, others carry their name (terraform workspace new staging).
terraform {
  required_version = ">= 1.11, < 2.0"
  required_providers {
    google = {
      source  = "hashicorp/google"
      version = "~> 6.50"
    }
  }
}

provider "google" {
  project = var.project
  region  = var.region
}

locals {
  name = terraform.workspace == "default" ? "neuroloop" : "neuroloop-${terraform.workspace}"
}

module "platform" {
  source = "../../modules/gcp"

  name      = local.name
  project   = var.project
  region    = var.region
  bucket    = "${var.project}-${local.name}-store"
  api_from  = var.api_from
  gpu_nodes = var.gpu_nodes
  protected = terraform.workspace == "default"
}

output "platform" {
  description = "What the overlay deploy/kubernetes/overlays/gke needs to know."
  value       = module.platform
}
