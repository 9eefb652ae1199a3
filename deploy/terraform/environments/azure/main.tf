# One state a workspace: `default` is production, others carry their name (terraform workspace new staging).
terraform {
  required_version = ">= 1.11, < 2.0"
  required_providers {
    azurerm = {
      source  = "hashicorp/azurerm"
      version = "~> 4.50"
    }
  }
}

provider "azurerm" {
  subscription_id     = var.subscription
  storage_use_azuread = true
  features {}
}

locals {
  name = terraform.workspace == "default" ? "neuroloop" : "neuroloop-${terraform.workspace}"
}

module "platform" {
  source = "../../modules/azure"

  name               = local.name
  unique             = "${var.unique}${terraform.workspace == "default" ? "" : terraform.workspace}"
  location           = var.location
  admins             = var.admins
  api_from           = var.api_from
  gpu_nodes          = var.gpu_nodes
  database_superuser = var.database_superuser
  superuser_version  = var.superuser_version
  protected          = terraform.workspace == "default"
}

output "platform" {
  description = "What the overlay deploy/kubernetes/overlays/aks needs to know."
  value       = module.platform
}
